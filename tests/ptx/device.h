// device.h: the GPU that the interpreter pretends to be.
#pragma once

// Bytes of shared memory that a block may have, for the architecture of the program's PTX.
int most_shared_memory();
