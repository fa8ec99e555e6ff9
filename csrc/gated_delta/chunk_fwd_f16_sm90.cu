// chunk_fwd_kernel.cuh for f16 on wgmma.
#include "gated_delta/chunk_fwd_kernel.cuh"

int df::chunk_fwd_f16_sm90_cuda(const ChunkFwdCuda& args, void* stream) {
  return cuda::chunk_fwd_tma<f16>(args, stream);
}
