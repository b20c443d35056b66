// runtime.h: what tests ask of the interpreter beside CUDA's own functions.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

// What was found since the last call, "category: text", each once for a source line.
std::vector<std::string> ptxsim_take_findings();
