// device.h: the GPU that the interpreter pretends to be.
#pragma once

// Bytes of shared memory that a block may have: as the architecture of the program's PTX, or PTXSIM_SHARED_KIB, says.
int most_shared_memory();
