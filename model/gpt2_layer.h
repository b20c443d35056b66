// gpt2_layer.h: the twelve parameters of a transformer block, by role instead of by position.
#pragma once

#include <cstdint>
#include <vector>

#include "flora/parameter.h"

struct Gpt2Layer {
  static constexpr int64_t kParameters = 12;  // per block
  static constexpr int64_t kFirst = 2;        // after wte and wpe; see gpt2_parameters()

  Gpt2Layer(const std::vector<Parameter>& all, int64_t index) : Gpt2Layer(&all[kFirst + index * kParameters]) {}

  const Parameter &ln1_weight, &ln1_bias, &qkv_weight, &qkv_bias, &proj_weight, &proj_bias, &ln2_weight, &ln2_bias,
      &fc_weight, &fc_bias, &mlp_proj_weight, &mlp_proj_bias;

 private:
  explicit Gpt2Layer(const Parameter* p)
      : ln1_weight(p[0]),
        ln1_bias(p[1]),
        qkv_weight(p[2]),
        qkv_bias(p[3]),
        proj_weight(p[4]),
        proj_bias(p[5]),
        ln2_weight(p[6]),
        ln2_bias(p[7]),
        fc_weight(p[8]),
        fc_bias(p[9]),
        mlp_proj_weight(p[10]),
        mlp_proj_bias(p[11]) {}
};
