// attention.h: the scratch memory of attention.cpp, for the backend's workspace.
#pragma once

#include <cstdint>

// Floats per thread: one head's Q, K, V, their gradients and that of the output, and two tiles of T scores.
int64_t attention_scratch_floats(int64_t sequence, int64_t channels, int64_t heads);
