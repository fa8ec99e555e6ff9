// chunk_bwd_chunks.cuh for float32, on mma.sync; K > 128 is compiled apart.
#include "gated_delta/chunk_bwd_chunks.cuh"

int df::chunk_bwd_chunks_f32(const ChunkBwdCuda& args, void* stream) {
  return args.in.shape.K <= 128 ? cuda::chunk_grads_narrow<cuda::Sm80, float>(args, stream)
                                : chunk_bwd_chunks_f32_wide(args, stream);
}
