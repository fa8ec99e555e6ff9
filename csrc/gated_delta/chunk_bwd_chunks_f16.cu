// chunk_bwd_chunks.cuh for float16, on mma.sync.
#include "gated_delta/chunk_bwd_chunks.cuh"

int df::chunk_bwd_chunks_f16(const ChunkBwdCuda& args, void* stream) {
  return cuda::chunk_grads_dispatch<cuda::Sm80, f16>(args, stream);
}
