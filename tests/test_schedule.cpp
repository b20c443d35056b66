// test_schedule.cpp: learning rate schedules at the points that their formulas fix.
#include "flora/schedule.h"

#include <gtest/gtest.h>

#include <cmath>

namespace {

ScheduleConfig config(ScheduleKind kind) {
  ScheduleConfig c;
  c.kind = kind;
  c.peak = 2.0f;
  c.warmup_steps = 10;
  c.final_fraction = 0.1f;
  c.cooldown_steps = 22;
  return c;
}

const ScheduleKind kAll[] = {ScheduleKind::kCosine, ScheduleKind::kLinear, ScheduleKind::kConstant, ScheduleKind::kWsd};

TEST(Schedule, WarmsUpLinearly) {
  for (ScheduleKind kind : kAll)
    for (uint32_t t = 1; t <= 10; ++t) EXPECT_FLOAT_EQ(learning_rate(config(kind), t, 110), 0.2f * t);
}

TEST(Schedule, EndsAtTheFinalFractionAndStaysThere) {
  for (ScheduleKind kind : {ScheduleKind::kCosine, ScheduleKind::kLinear, ScheduleKind::kWsd})
    for (uint32_t t : {110u, 111u, 500u}) EXPECT_FLOAT_EQ(learning_rate(config(kind), t, 110), 0.2f);
  EXPECT_FLOAT_EQ(learning_rate(config(ScheduleKind::kConstant), 500, 110), 2.0f);
}

TEST(Schedule, HasTheFormulasInTheMiddle) {
  EXPECT_FLOAT_EQ(learning_rate(config(ScheduleKind::kCosine), 60, 110), 1.1f);
  EXPECT_FLOAT_EQ(learning_rate(config(ScheduleKind::kCosine), 35, 110),
                  static_cast<float>(2 * (0.1 + 0.9 * 0.5 * (1 + std::cos(M_PI * 0.25)))));
  EXPECT_FLOAT_EQ(learning_rate(config(ScheduleKind::kLinear), 35, 110), 2 * (1 - 0.9f * 0.25f));
}

TEST(Schedule, WsdHoldsThePeakAndCoolsDown) {
  ScheduleConfig c = config(ScheduleKind::kWsd);
  c.cooldown_steps = 40;
  EXPECT_FLOAT_EQ(learning_rate(c, 11, 100), 2.0f);
  EXPECT_FLOAT_EQ(learning_rate(c, 60, 100), 2.0f);
  EXPECT_FLOAT_EQ(learning_rate(c, 70, 100), 2 * (1 - 0.9f * 0.5f));  // a quarter of the way: sqrt is one half
  c.cooldown_steps = 20;
  EXPECT_FLOAT_EQ(learning_rate(c, 80, 100), 2.0f);
  EXPECT_FLOAT_EQ(learning_rate(c, 85, 100), 2 * (1 - 0.9f * 0.5f));
  c.cooldown_steps = 1000;  // never reaches into the warmup
  EXPECT_FLOAT_EQ(learning_rate(c, 10, 100), 2.0f);
  EXPECT_LT(learning_rate(c, 11, 100), 2.0f);
}

TEST(Schedule, NeverRisesAfterTheWarmup) {
  for (ScheduleKind kind : kAll)
    for (uint32_t t = 10; t < 200; ++t)
      EXPECT_LE(learning_rate(config(kind), t + 1, 150), learning_rate(config(kind), t, 150));
}

TEST(Schedule, WithoutWarmupStartsNearThePeak) {
  ScheduleConfig c = config(ScheduleKind::kCosine);
  c.warmup_steps = 0;
  EXPECT_GT(learning_rate(c, 1, 1000), 1.99f);
  EXPECT_LE(learning_rate(c, 1, 1000), 2.0f);
  c.warmup_steps = 100;  // a run that ends with its warmup
  EXPECT_FLOAT_EQ(learning_rate(c, 100, 100), 2.0f);
  EXPECT_FLOAT_EQ(learning_rate(c, 50, 50), 1.0f);
}

}  // namespace
