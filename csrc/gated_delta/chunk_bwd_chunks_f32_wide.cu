// chunk_bwd_chunks.cuh for float32 and K > 128, on mma.sync.
#include "gated_delta/chunk_bwd_chunks.cuh"

int df::chunk_bwd_chunks_f32_wide(const ChunkBwdCuda& args, void* stream) {
  return cuda::chunk_grads_wide<cuda::Sm80, float>(args, stream);
}
