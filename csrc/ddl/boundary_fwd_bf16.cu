// boundary_fwd_whole.cuh for states of type bfloat16.
#include "ddl/boundary_fwd_whole.cuh"

bool df::boundary_fwd_bf16_cuda(const BoundaryArgs& args, void* stream) {
  return cuda::boundary_fwd_launch<bf16>(args, stream);
}
