// chunk_bwd_chunks.cuh for float32, on mma.sync.
#include "gated_delta/chunk_bwd_chunks.cuh"

int df::chunk_bwd_chunks_f32(const ChunkBwdCuda& args, void* stream) {
  return cuda::chunk_grads_dispatch<cuda::Sm80, float>(args, stream);
}
