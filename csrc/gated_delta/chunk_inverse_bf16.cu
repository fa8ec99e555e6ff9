// chunk_inverse_kernel.cuh for bf16.
#include "gated_delta/chunk_inverse_kernel.cuh"

int df::chunk_inverse_bf16_cuda(const ChunkFwdCuda& args, void* stream) {
  return cuda::chunk_inverse_dispatch<bf16>(args, stream);
}
