// schedule.h: the learning rate as a pure function of the step. Costs nothing and keeps no state, so that a resumed run
// continues exactly.
#pragma once

#include <cstdint>
#include <utility>

enum class ScheduleKind : uint8_t {
  kCosine,    // half a cosine from the peak to the final rate
  kLinear,    // a straight line to the final rate
  kConstant,  // the peak
  kWsd,       // warmup, stable, decay: the peak, then a cooldown of the form 1 - sqrt to the final rate
};
inline constexpr std::pair<ScheduleKind, const char*> kScheduleNames[] = {{ScheduleKind::kCosine, "cosine"},
                                                                          {ScheduleKind::kLinear, "linear"},
                                                                          {ScheduleKind::kConstant, "constant"},
                                                                          {ScheduleKind::kWsd, "wsd"}};

struct ScheduleConfig {
  ScheduleKind kind = ScheduleKind::kCosine;
  float peak = 1e-3f;           // learning rate after the warmup
  uint32_t warmup_steps = 0;    // linear: step t of them has peak * t / warmup_steps
  float final_fraction = 0.1f;  // of the peak, reached in the last step (not by kConstant)
  uint32_t cooldown_steps = 0;  // kWsd: length of the cooldown in steps
};

// The learning rate of step t = 1 .. total. With x in [0, 1] the progress from the end of the warmup to step `total`
// (kWsd: through the cooldown) and f the final fraction:
//   cosine  peak (f + (1 - f) (1 + cos(pi x)) / 2)
//   linear  peak (1 - (1 - f) x)
//   wsd     peak (1 - (1 - f) sqrt(x)), after Haegele et al., arXiv 2405.18392
// Steps after `total` keep the last rate.
float learning_rate(const ScheduleConfig& config, uint32_t step, uint32_t total);
