// chunk_inverse_kernel.cuh for f16.
#include "gated_delta/chunk_inverse_kernel.cuh"

int df::chunk_inverse_f16_cuda(const ChunkFwdCuda& args, void* stream) {
  return cuda::chunk_inverse_dispatch<f16>(args, stream);
}
