// chunk_bwd_chunks.cuh for bfloat16, on mma.sync.
#include "gated_delta/chunk_bwd_chunks.cuh"

int df::chunk_bwd_chunks_bf16(const ChunkBwdCuda& args, void* stream) {
  return cuda::chunk_grads_dispatch<cuda::Sm80, bf16>(args, stream);
}
