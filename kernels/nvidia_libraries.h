// nvidia_libraries.h: NVIDIA's shared libraries, loaded at run time from wherever they were installed.
#pragma once

#include <string>
#include <vector>

// Folders that may hold them and that the dynamic linker need not know, each with a '/' at its end: of the CUDA Toolkit
// (CUDA_HOME, CUDA_PATH), of conda (CONDA_PREFIX), of pip's packages nvidia-* in the virtual environment (VIRTUAL_ENV),
// in conda's, the user's and the system's Python, and the usual places of the toolkit.
std::vector<std::string> nvidia_library_folders();

// The first library of `names` (such as libnccl.so.2) that loads, where the dynamic linker looks or else in one of the
// folders; a name that comes earlier is looked for everywhere before the next. nullptr when there is none: `reason` is
// then what the dynamic linker says of the first name.
void* open_nvidia_library(const std::vector<std::string>& names, std::string& reason);
