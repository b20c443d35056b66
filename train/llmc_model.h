// llmc_model.h: reads the model files that llm.c's train_gpt2.py and its trainers write (gpt2_124M.bin and the like).
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "flora/parameter.h"
#include "model/config.h"

// From the header: 256 int32, magic 20240326, version 3 (fp32) or 5 (bf16), then positions, vocabulary, layers, heads,
// channels, padded vocabulary. Throws std::runtime_error naming the file.
Gpt2Config llmc_config(const std::string& path);

// Calls set(parameter, values) for every parameter. llm.c keeps tensors of one role together, layers stacked, and
// linear weights as [out, in]; the values come in this project's layout, [in, out].
void load_llmc(const std::string& path, const std::vector<Parameter>& parameters,
               const std::function<void(const Parameter&, const std::vector<float>&)>& set);
