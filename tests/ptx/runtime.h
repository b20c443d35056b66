// runtime.h: what the stand-in of cuBLASLt and the tests ask of the interpreter's CUDA runtime.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <vector>

// Does run(data) in the order of the stream's work. `data` is never freed: a graph may run the work again.
void ptxsim_enqueue(cudaStream_t stream, void (*run)(void*), void* data);
// Whether all of these bytes lie within one allocation of the device.
bool ptxsim_is_device_range(const void* p, size_t bytes);
// Of these bytes: were they written? Reading what never was is a finding.
void ptxsim_mark_defined(const void* p, size_t bytes, bool defined);
bool ptxsim_is_defined(const void* p, size_t bytes);
// Records a mistake, which fails the test that is running.
void ptxsim_finding(const char* category, const std::string& text);
// What was found since the last call, "category: text", each once for a source line.
std::vector<std::string> ptxsim_take_findings();
