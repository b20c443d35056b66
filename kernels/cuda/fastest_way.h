// fastest_way.h: finds by measuring which of several ways to compute the same is the fastest.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <functional>
#include <vector>

// Each enqueues its work on one stream; false when it cannot.
using Ways = std::vector<std::function<bool()>>;

// The shortest of several times of each way in milliseconds, infinity for one that fails. Runs all of them several
// times; the host waits.
std::vector<float> shortest_times(const Ways& ways, cudaStream_t stream);

// The index of the way to take: the first unless another is clearly faster.
size_t fastest(const Ways& ways, cudaStream_t stream);
