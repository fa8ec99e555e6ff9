// boundary_fwd_whole.cuh for states of type float16.
#include "ddl/boundary_fwd_whole.cuh"

bool df::boundary_fwd_f16_cuda(const BoundaryArgs& args, void* stream) {
  return cuda::boundary_fwd_launch<f16>(args, stream);
}
