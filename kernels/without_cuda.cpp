// without_cuda.cpp: what a build without the CUDA Toolkit says about CUDA. The linker takes it only where nothing from
// kernels/cuda/ was linked.
#include <stdexcept>

#include "kernels/backend.h"
#include "kernels/side_stream.h"

int cuda_device_count() { return 0; }

std::string cuda_device_id(int) { return ""; }

std::string cuda_unavailable(int) { return "this program was built without CUDA (" WITHOUT_CUDA ")"; }

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions&) { throw std::runtime_error(cuda_unavailable()); }

std::unique_ptr<SideStream> make_side_stream(Backend&) { throw std::runtime_error(cuda_unavailable()); }
