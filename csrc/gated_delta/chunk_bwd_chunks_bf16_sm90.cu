// chunk_bwd_chunks.cuh for bfloat16, on wgmma.
#include "common/cuda/mma_sm90.cuh"
#include "gated_delta/chunk_bwd_chunks.cuh"

int df::chunk_bwd_chunks_bf16_sm90(const ChunkBwdCuda& args, void* stream) {
  return cuda::chunk_grads_dispatch<cuda::Sm90, bf16>(args, stream);
}
