// runtime.h: what the stand-in of cuBLASLt and the tests ask of the interpreter's CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

// `data` is never freed: a graph may run the work again.
void ptxsim_enqueue(cudaStream_t stream, void (*run)(void*), void* data);
bool ptxsim_is_device_range(const void* p, size_t bytes);
void ptxsim_mark_defined(const void* p, size_t bytes, bool defined);
bool ptxsim_is_defined(const void* p, size_t bytes);
void ptxsim_finding(const char* category, const std::string& text);
// What was found since the last call, "category: text", each once for a source line.
std::vector<std::string> ptxsim_take_findings();
