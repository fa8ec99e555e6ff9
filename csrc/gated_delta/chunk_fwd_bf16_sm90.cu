// chunk_fwd_kernel.cuh for bf16 on wgmma.
#include "gated_delta/chunk_fwd_kernel.cuh"

int df::chunk_fwd_bf16_sm90_cuda(const ChunkFwdCuda& args, void* stream) {
  return cuda::chunk_fwd_tma<bf16>(args, stream);
}
