// test_ptx_arithmetic.cu: what the interpreter computes for one thread: integers, fp32 and fp64 on random and special
// values, against the same C++ on the host, and instructions that C++ has no word for.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/cuda/launch.cuh"
#include "tests/ptx/device_buffer.h"

namespace {

constexpr int kCount = 1000;

struct In {
  uint32_t a, b, c;
  uint64_t l, m;
  float x, y, z;
  double d, e;
};

std::vector<In> random_inputs() {
  std::mt19937_64 random(7);
  std::vector<In> in(kCount);
  for (In& v : in) {
    v.a = static_cast<uint32_t>(random()) >> random() % 32, v.b = static_cast<uint32_t>(random()) >> random() % 32;
    v.c = static_cast<uint32_t>(random());
    v.l = random() >> random() % 64, v.m = random() >> random() % 64;
    for (float* f : {&v.x, &v.y, &v.z})
      *f = static_cast<float>(static_cast<int64_t>(random())) * std::ldexp(1.0f, -static_cast<int>(random() % 80));
    v.d = static_cast<double>(static_cast<int64_t>(random())) * 1e-17, v.e = static_cast<double>(random()) * 1e-15;
  }
  in[0].x = INFINITY, in[1].y = -INFINITY, in[2].x = 0, in[3].y = 0, in[4].x = NAN, in[5].y = NAN;
  in[6].x = 1e-40f, in[7].y = -1e-42f, in[8].x = -0.0f, in[8].y = 0.0f, in[9].a = 0x80000000u, in[10].b = 0;
  return in;
}

// ---- expressions, compiled for both sides

struct Out {
  uint64_t i[25];
  float f[17];
  double d[6];
};

__host__ __device__ uint64_t mulhi64(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

__host__ __device__ void evaluate(const In& in, Out& o) {
  const int32_t sa = static_cast<int32_t>(in.a), sb = static_cast<int32_t>(in.b);
  const int64_t sl = static_cast<int64_t>(in.l), sm = static_cast<int64_t>(in.m);
  const int16_t ha = static_cast<int16_t>(in.a), hb = static_cast<int16_t>(in.b);
  const int8_t ba = static_cast<int8_t>(in.a);
  const uint8_t ub = static_cast<uint8_t>(in.b);
  int k = 0;
  o.i[k++] = in.a + in.b;
  o.i[k++] = in.a * in.b;
  o.i[k++] = static_cast<uint64_t>(in.a) * in.b;
  o.i[k++] = static_cast<uint64_t>(static_cast<int64_t>(sa) * sb);
  o.i[k++] = in.b ? in.a / in.b : 1;
  o.i[k++] = in.b ? in.a % in.b : 1;
  o.i[k++] = sb && sb != -1 ? static_cast<uint64_t>(sa / sb) : 1;
  o.i[k++] = sb && sb != -1 ? static_cast<uint64_t>(sa % sb) : 1;
  o.i[k++] = in.m ? in.l / in.m : 1;
  o.i[k++] = sm && sm != -1 ? static_cast<uint64_t>(sl % sm) : 1;
  o.i[k++] = static_cast<uint64_t>(sl >> (in.b & 63));
  o.i[k++] = in.l << (in.a & 63);
  o.i[k++] = static_cast<uint64_t>(static_cast<int64_t>(sa >> (in.b & 31)));
  o.i[k++] = in.a >> (in.c & 31);
  o.i[k++] = mulhi64(in.l, in.m);
  o.i[k++] = sa < sb ? in.a : in.c;
  o.i[k++] = static_cast<uint64_t>(sl < sm ? sl : sm);
  o.i[k++] = static_cast<uint64_t>(static_cast<int64_t>(ha) * hb + sa);
  o.i[k++] = static_cast<uint16_t>(ha + hb) ^ static_cast<uint16_t>(~ha);
  o.i[k++] = static_cast<uint64_t>(static_cast<int64_t>(ba)) + ub;
  o.i[k++] = (in.a & in.b) | ((~in.c & in.a) ^ in.b);
  o.i[k++] = (in.a >> 8 & 0xffu) | (in.b & 0xff00u) | (in.c << 24);
  o.i[k++] = in.l ^ (in.l >> 31) ^ (in.m << 13);
  o.i[k++] = static_cast<uint64_t>(sa < 0 ? -static_cast<int64_t>(sa) : sa);
  o.i[k++] = (static_cast<uint64_t>(in.a) << 32 | in.b) * 3;
  k = 0;
  o.f[k++] = in.x + in.y;
  o.f[k++] = in.x * in.y;
  o.f[k++] = in.x - in.z;
  o.f[k++] = in.x / in.y;
  o.f[k++] = fmaf(in.x, in.y, in.z);
  o.f[k++] = sqrtf(fabsf(in.x));
  o.f[k++] = fmaxf(in.x, in.y);
  o.f[k++] = fminf(in.y, in.z);
  o.f[k++] = rintf(in.x);
  o.f[k++] = floorf(in.y);
  o.f[k++] = truncf(in.z);
  o.f[k++] = static_cast<float>(sa);
  o.f[k++] = static_cast<float>(in.l);
  o.f[k++] = static_cast<float>(sl);
  o.f[k++] = static_cast<float>(in.d);
  o.f[k++] = in.x < in.y ? in.z : -in.z;
  o.f[k++] = 1.0f / in.y;
  k = 0;
  o.d[k++] = in.d * in.e + 1.0;
  o.d[k++] = in.d / in.e;
  o.d[k++] = static_cast<double>(in.x) + in.d;
  o.d[k++] = sqrt(fabs(in.d));
  o.d[k++] = static_cast<double>(sl);
  o.d[k++] = fma(in.d, in.e, in.d);
}

__global__ void evaluate_kernel(const In* in, Out* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) evaluate(in[i], out[i]);
}

// The same bits, or both NaN.
template <typename T>
bool same(T a, T b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

TEST(PtxArithmetic, ExpressionsAsOnTheHost) {
  const std::vector<In> in = random_inputs();
  const DeviceBuffer<In> device_in(in);
  const DeviceBuffer<Out> device_out(kCount);
  launch("evaluate_kernel", evaluate_kernel, {.grid = 8, .block = 128}, device_in.data(), device_out.data(), kCount);
  const std::vector<Out> out = device_out.read();
  for (int i = 0; i < kCount; ++i) {
    Out expected;
    evaluate(in[i], expected);
    for (int k = 0; k < 25; ++k) ASSERT_EQ(out[i].i[k], expected.i[k]) << "integer expression " << k << ", input " << i;
    for (int k = 0; k < 17; ++k)
      ASSERT_TRUE(same(out[i].f[k], expected.f[k])) << "fp32 expression " << k << ", input " << i;
    for (int k = 0; k < 6; ++k)
      ASSERT_TRUE(same(out[i].d[k], expected.d[k])) << "fp64 expression " << k << ", input " << i;
  }
}

// ---- what C++ has no word for

struct Special {
  uint32_t byte_perm, funnel, insert, extract, popc, clz, reversed, lop3, above_zero, pair;
  int32_t to_nearest, saturated, mulhi;
  float toward_zero, downward, ex2, rcp, rsqrt, lg2, sine;
};

__global__ void special_kernel(const In* in, Special* out, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  const In v = in[i];
  Special s;
  s.byte_perm = __byte_perm(v.a, v.b, v.c & 0x7777);
  s.funnel = __funnelshift_l(v.a, v.b, v.c);
  asm("bfi.b32 %0, %1, %2, %3, %4;" : "=r"(s.insert) : "r"(v.a), "r"(v.b), "r"(v.c & 31), "r"(v.c >> 8 & 31));
  asm("bfe.s32 %0, %1, %2, %3;" : "=r"(s.extract) : "r"(v.a), "r"(v.c & 31), "r"(v.c >> 8 & 31));
  s.popc = static_cast<uint32_t>(__popc(v.a));
  s.clz = static_cast<uint32_t>(__clz(static_cast<int>(v.a)));
  s.reversed = __brev(v.a);
  asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(s.lop3) : "r"(v.a), "r"(v.b), "r"(v.c));
  s.to_nearest = __float2int_rn(v.x);
  s.above_zero = __float2uint_rz(v.y);
  s.saturated = __float2int_rz(v.x * 1e12f);
  s.mulhi = __mulhi(static_cast<int>(v.a), static_cast<int>(v.b));
  s.toward_zero = __fadd_rz(v.x, v.z);
  s.downward = __fmaf_rd(v.x, v.y, v.z);
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(s.pair) : "f"(v.x), "f"(v.y));
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(s.ex2) : "f"(v.x * 0.01f));
  asm("rcp.approx.f32 %0, %1;" : "=f"(s.rcp) : "f"(v.y));
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(s.rsqrt) : "f"(fabsf(v.y)));
  asm("lg2.approx.f32 %0, %1;" : "=f"(s.lg2) : "f"(fabsf(v.y)));
  s.sine = sinf(v.x * 1e6f);
  out[i] = s;
}

class PtxSpecial : public ::testing::Test {
 protected:
  // f(input, what the interpreter computed for it).
  template <typename F>
  void for_each(F&& f) const {
    const std::vector<In> in = random_inputs();
    const DeviceBuffer<In> device_in(in);
    const DeviceBuffer<Special> device_out(kCount);
    launch("special_kernel", special_kernel, {.grid = 8, .block = 128}, device_in.data(), device_out.data(), kCount);
    const std::vector<Special> out = device_out.read();
    for (int i = 0; i < kCount; ++i) {
      f(in[i], out[i]);
      ASSERT_FALSE(HasFailure()) << "input " << i;
    }
  }
};

TEST_F(PtxSpecial, Bits) {
  for_each([](const In& v, const Special& s) {
    const uint64_t both = v.a | static_cast<uint64_t>(v.b) << 32;
    uint32_t bytes = 0, reversed = 0;
    for (int k = 0; k < 4; ++k) bytes |= static_cast<uint32_t>(both >> 8 * (v.c >> 4 * k & 7) & 255) << 8 * k;
    for (int k = 0; k < 32; ++k) reversed |= (v.a >> k & 1) << (31 - k);
    EXPECT_EQ(s.byte_perm, bytes);
    EXPECT_EQ(s.reversed, reversed);
    EXPECT_EQ(s.funnel, static_cast<uint32_t>((both << (v.c & 31)) >> 32));
    const uint32_t at = v.c & 31, length = v.c >> 8 & 31, field = length ? (1u << length) - 1 : 0;
    EXPECT_EQ(s.insert, (v.b & ~(field << at)) | ((v.a & field) << at));
    const int64_t wide = static_cast<int32_t>(v.a);
    EXPECT_EQ(s.extract, static_cast<uint32_t>(length ? (wide >> at) << (64 - length) >> (64 - length) : 0));
    EXPECT_EQ(s.popc, static_cast<uint32_t>(__builtin_popcount(v.a)));
    EXPECT_EQ(s.clz, v.a ? static_cast<uint32_t>(__builtin_clz(v.a)) : 32u);
    EXPECT_EQ(s.lop3, v.a ^ v.b ^ v.c);
    EXPECT_EQ(s.mulhi, static_cast<int32_t>((wide * static_cast<int32_t>(v.b)) >> 32));
  });
}

double clamped(double x, double low, double high) { return std::isnan(x) ? 0 : std::fmin(std::fmax(x, low), high); }

uint32_t bf16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

TEST_F(PtxSpecial, Conversions) {
  for_each([](const In& v, const Special& s) {
    EXPECT_EQ(s.to_nearest, static_cast<int32_t>(clamped(std::nearbyint(double{v.x}), INT32_MIN, INT32_MAX)));
    EXPECT_EQ(s.above_zero, static_cast<uint32_t>(clamped(std::trunc(double{v.y}), 0, UINT32_MAX)));
    EXPECT_EQ(s.saturated, static_cast<int32_t>(clamped(std::trunc(double{v.x * 1e12f}), INT32_MIN, INT32_MAX)));
    EXPECT_EQ(s.pair, bf16_bits(v.x) << 16 | bf16_bits(v.y));
  });
}

// The result and its neighbour on the other side enclose the exact value.
TEST_F(PtxSpecial, DirectedRounding) {
  for_each([](const In& v, const Special& s) {
    const double sum = double{v.x} + double{v.z};
    if (std::isfinite(sum)) {
      EXPECT_LE(std::fabs(double{s.toward_zero}), std::fabs(sum));
      EXPECT_GE(std::fabs(double{std::nextafterf(s.toward_zero, sum > 0 ? INFINITY : -INFINITY)}), std::fabs(sum));
    }
    const long double product = static_cast<long double>(v.x) * v.y + v.z;
    if (std::fabs(product) < 3e38L) {
      EXPECT_LE(static_cast<long double>(s.downward), product);
      EXPECT_GE(static_cast<long double>(std::nextafterf(s.downward, INFINITY)), product);
    }
  });
}

bool near(float a, double b, double bound) {
  const bool tiny = std::fabs(b) < 1.2e-38;  // may be flushed
  return (std::isnan(a) && std::isnan(b)) || a == b || tiny || std::fabs(a - b) <= bound * std::fabs(b);
}

TEST_F(PtxSpecial, Approximations) {
  for_each([](const In& v, const Special& s) {
    const float exponent = v.x * 0.01f, angle = v.x * 1e6f;
    const double y = std::fabs(double{v.y});
    EXPECT_TRUE(near(s.ex2, std::exp2(double{exponent}), 1e-6) || exponent > 127.9f);
    EXPECT_TRUE(near(s.rsqrt, 1 / std::sqrt(y), 1e-6));
    if (!(y <= 1e-37)) {
      EXPECT_TRUE(near(s.rcp, 1.0 / v.y, 1e-6));
      EXPECT_TRUE(near(s.lg2, std::log2(y), 1e-5));
    }
    if (std::isfinite(angle))
      EXPECT_NEAR(s.sine, std::sin(double{angle}), 1e-6);
    else
      EXPECT_TRUE(std::isnan(s.sine));
  });
}

}  // namespace
