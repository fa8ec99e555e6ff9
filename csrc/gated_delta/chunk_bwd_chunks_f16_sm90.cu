// chunk_bwd_chunks.cuh for float16, on wgmma.
#include "common/cuda/mma_sm90.cuh"
#include "gated_delta/chunk_bwd_chunks.cuh"

int df::chunk_bwd_chunks_f16_sm90(const ChunkBwdCuda& args, void* stream) {
  return cuda::chunk_grads_dispatch<cuda::Sm90, f16>(args, stream);
}
