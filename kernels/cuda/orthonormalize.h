// orthonormalize.h: the scratch that orthonormalize_rows() takes from the backend's workspace.
#pragma once

#include <cstddef>
#include <cstdint>

// For projections with `rows` rows.
size_t orthonormalize_scratch_bytes(int64_t rows);
