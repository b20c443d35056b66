// schedule.cpp: learning rate schedules; see schedule.h. A handful of operations per step.
#include "flora/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace {

// Where `step` is between `begin` (0) and `end` (1).
double progress(double step, double begin, double end) {
  return end > begin ? std::clamp((step - begin) / (end - begin), 0.0, 1.0) : 0.0;
}

// First step at the peak's end: the cooldown never reaches into the warmup.
double cooldown_begin(const ScheduleConfig& config, double total) {
  return std::max<double>(config.warmup_steps, total - config.cooldown_steps);
}

}  // namespace

float learning_rate(const ScheduleConfig& config, uint32_t step, uint32_t total) {
  const double t = std::min(step, total), warmup = config.warmup_steps, end = total;
  const double peak = config.peak, fall = 1.0 - static_cast<double>(config.final_fraction);
  if (t < warmup) return static_cast<float>(peak * t / warmup);
  double factor = 1.0;
  switch (config.kind) {
    case ScheduleKind::kCosine:
      factor = 1.0 - fall * 0.5 * (1.0 - std::cos(std::numbers::pi * progress(t, warmup, end)));
      break;
    case ScheduleKind::kLinear: factor = 1.0 - fall * progress(t, warmup, end); break;
    case ScheduleKind::kConstant: break;
    case ScheduleKind::kWsd: {
      const double begin = cooldown_begin(config, end);
      if (t > begin) factor = 1.0 - fall * std::sqrt(progress(t, begin, end));
      break;
    }
  }
  return static_cast<float>(peak * factor);
}
