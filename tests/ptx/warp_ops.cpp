// warp_ops.cpp: what the threads of a warp do together: shuffles, votes, reductions, tensor cores.
#include "tests/ptx/warp_ops.h"

#include <algorithm>

#include "tests/ptx/operations.h"

namespace ptx {

namespace {
// Executing threads that the mask does not name.
void check_members(Warp& w, Instruction& i, uint32_t m, uint32_t members) {
  if (m & ~members)
    report("warp-synchronous", w, i, m & ~members, "a thread executes it that is not in the mask %08x", members);
}
}  // namespace

// o: d, a, b, c, mask. mode: 0 up, 1 down, 2 bfly, 3 idx.
void shuffle(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t* const a = src<uint32_t>(w, i.operands[1]);
  const uint32_t* const b = src<uint32_t>(w, i.operands[2]);
  const uint32_t* const c = src<uint32_t>(w, i.operands[3]);
  const uint32_t members = src<uint32_t>(w, i.operands[4])[first_lane(m)];
  check_members(w, i, m, members);
  alignas(64) uint32_t r[32] = {};
  uint32_t defined = 0, valid = 0, outside = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(m >> l & 1)) continue;
    const int bval = static_cast<int>(b[l] & 31), cval = static_cast<int>(c[l] & 31),
              segment = static_cast<int>(c[l] >> 8 & 31);
    const int low = l & segment, high = low | (cval & ~segment);
    int j = 0;
    bool ok = false;
    switch (i.mode) {
      case 0:
        j = l - bval;
        ok = j >= high;
        break;
      case 1:
        j = l + bval;
        ok = j <= high;
        break;
      case 2:
        j = l ^ bval;
        ok = j <= high;
        break;
      default:
        j = low | (bval & ~segment);
        ok = j <= high;
        break;
    }
    if (!ok) j = l;
    r[l] = a[j];
    valid |= static_cast<uint32_t>(ok) << l;
    if (!(m >> j & 1))
      outside |= 1u << l;  // the source does not take part: any value
    else if (w.def[i.operands[1].slot] >> j & 1)
      defined |= 1u << l;
  }
  defined &= w.def[i.operands[2].slot] & w.def[i.operands[3].slot] & ~outside;
  put(w, i.operands[0], r, m, defined);
  if (i.predicate_out2 >= 0) put_pred(w, i.predicate_out2, valid, m, ~0u);
}

// mode: 0 all, 1 any, 2 uni, 3 ballot. ps: the predicate, o[nd]: the mask.
void vote(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t members = src<uint32_t>(w, i.operands[i.results])[first_lane(m)];
  check_members(w, i, m, members);
  uint32_t p = w.pred[i.predicate_in];
  if (i.predicate_in_negated) p = ~p;
  p &= m;
  const uint32_t known = (m & ~w.pdef[i.predicate_in]) ? 0 : ~0u;
  if (i.mode == 3) {
    uint32_t r[32];
    for (uint32_t& x : r) x = p;
    put(w, i.operands[0], r, m, known);
    return;
  }
  const bool all = p == m, any = p != 0;
  const bool result = i.mode == 0 ? all : i.mode == 1 ? any : all || !any;
  put_pred(w, i.predicate_out, result ? ~0u : 0u, m, known);
}

void redux(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t members = src<uint32_t>(w, i.operands[2])[first_lane(m)];
  check_members(w, i, m, members);
  const uint32_t* const a = src<uint32_t>(w, i.operands[1]);
  bool started = false;
  uint32_t total = 0;
  for (int l = 0; l < 32; ++l) {
    if (!(m >> l & 1)) continue;
    total = !started      ? a[l]
            : i.ty == S32 ? static_cast<uint32_t>(atomic_result<int32_t>(
                                static_cast<int>(i.x), static_cast<int32_t>(total), static_cast<int32_t>(a[l]), 0))
                          : atomic_result<uint32_t>(static_cast<int>(i.x), total, a[l], 0);
    started = true;
  }
  uint32_t r[32];
  for (uint32_t& x : r) x = total;
  put(w, i.operands[0], r, m, (m & ~w.def[i.operands[1].slot]) ? 0 : ~0u);
}

void match_any(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t members = src<uint32_t>(w, i.operands[2])[first_lane(m)];
  check_members(w, i, m, members);
  const Place& o = i.operands[1];
  uint32_t r[32] = {};
  for (int l = 0; l < 32; ++l)
    for (int k = 0; k < 32; ++k)
      if ((m >> k & 1) && lane_bits(w, o, k) == lane_bits(w, o, l)) r[l] |= 1u << k;
  put(w, i.operands[0], r, m, (m & ~w.def[o.slot]) ? 0 : ~0u);
}

void active_mask(Warp& w, Instruction& i, uint32_t m) {
  uint32_t r[32];
  for (uint32_t& x : r) x = m;
  put(w, i.operands[0], r, m, ~0u);
}

void warp_barrier(Warp& w, Instruction& i, uint32_t m) {
  const uint32_t members = src<uint32_t>(w, i.operands[0])[first_lane(m)];
  check_members(w, i, m, members);
  if ((members & w.alive) == w.alive)
    ++w.sync_epoch;  // fewer order only themselves: not modelled, which can only warn too much
}

namespace {
// A sum as tensor cores are known to form it: terms aligned to the largest, cut off below 2^-24 of it, the result cut
// off.
float truncated_sum(const double* terms, int count) {
  int largest = -10000;
  for (int k = 0; k < count; ++k) {
    if (!std::isfinite(terms[k])) {
      double sum = 0;
      for (int j = 0; j < count; ++j) sum += terms[j];
      return static_cast<float>(sum);
    }
    if (terms[k] != 0) largest = std::max(largest, std::ilogb(terms[k]));
  }
  if (largest == -10000) return 0.0f;
  const double unit = std::ldexp(1.0, largest - 24);
  double sum = 0;
  for (int k = 0; k < count; ++k) sum += std::trunc(terms[k] / unit);
  sum *= unit;
  float r = static_cast<float>(sum);
  if (std::fabs(static_cast<double>(r)) > std::fabs(sum)) r = std::nextafterf(r, 0.0f);
  return r;
}
}  // namespace

// d += a b; o: d 0-3, a 4-7, b 8-9, c 10-13.
void mma_m16n8k16_bf16(Warp& w, Instruction& i, uint32_t m) {
  alignas(64) float a[16][16], b[8][16];  // [row][k], [col][k]
  alignas(64) float d[16][8];
  uint32_t a_unknown = 0, b_unknown = 0;
  for (int r = 0; r < 4; ++r) {
    const uint32_t* const words = src<uint32_t>(w, i.operands[4 + r]);
    const uint32_t known = w.def[i.operands[4 + r].slot];
    for (int l = 0; l < 32; ++l) {
      const int row = l / 4 + (r & 1) * 8, k = 2 * (l % 4) + (r >> 1) * 8;
      a[row][k] = widened(words[l] & 0xffff);
      a[row][k + 1] = widened(words[l] >> 16);
      if (!(known >> l & 1)) a_unknown |= 1u << row;
    }
  }
  for (int r = 0; r < 2; ++r) {
    const uint32_t* const words = src<uint32_t>(w, i.operands[8 + r]);
    const uint32_t known = w.def[i.operands[8 + r].slot];
    for (int l = 0; l < 32; ++l) {
      const int col = l / 4, k = 2 * (l % 4) + r * 8;
      b[col][k] = widened(words[l] & 0xffff);
      b[col][k + 1] = widened(words[l] >> 16);
      if (!(known >> l & 1)) b_unknown |= 1u << col;
    }
  }
  for (int r = 0; r < 4; ++r) {
    const float* const c = src<float>(w, i.operands[10 + r]);
    for (int l = 0; l < 32; ++l) d[l / 4 + (r >> 1) * 8][2 * (l % 4) + (r & 1)] = c[l];
  }
  if (machine.truncate_mma) {
    const int step = machine.architecture >= 90 ? 16 : 8;
    for (int row = 0; row < 16; ++row)
      for (int col = 0; col < 8; ++col)
        for (int k = 0; k < 16; k += step) {
          double terms[17];
          for (int j = 0; j < step; ++j) terms[j] = static_cast<double>(a[row][k + j]) * b[col][k + j];
          terms[step] = d[row][col];
          d[row][col] = truncated_sum(terms, step + 1);
        }
  } else {
    for (int row = 0; row < 16; ++row)
      for (int col = 0; col < 8; ++col) {
        double sum = d[row][col];
        for (int k = 0; k < 16; ++k) sum += static_cast<double>(a[row][k]) * b[col][k];
        d[row][col] = canonical(static_cast<float>(sum));
      }
  }
  for (int r = 0; r < 4; ++r) {
    alignas(64) float out[32];
    uint32_t defined = w.def[i.operands[10 + r].slot];
    for (int l = 0; l < 32; ++l) {
      const int row = l / 4 + (r >> 1) * 8, col = 2 * (l % 4) + (r & 1);
      out[l] = d[row][col];
      if ((a_unknown >> row & 1) || (b_unknown >> col & 1)) defined &= ~(1u << l);
    }
    put(w, i.operands[r], out, m, defined);
  }
}

}  // namespace ptx
