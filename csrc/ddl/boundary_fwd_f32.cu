// boundary_fwd_whole.cuh for states of type float.
#include "ddl/boundary_fwd_whole.cuh"

bool df::boundary_fwd_f32_cuda(const BoundaryArgs& args, void* stream) {
  return cuda::boundary_fwd_launch<float>(args, stream);
}
