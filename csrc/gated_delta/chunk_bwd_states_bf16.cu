// chunk_bwd_states.cuh for bf16 on mma.sync.
#include "gated_delta/chunk_bwd_states.cuh"

int df::chunk_bwd_states_bf16(const ChunkBwdCuda& args, void* stream) {
  return cuda::chunk_bwd_states_by_size<cuda::Sm80, bf16>(args, {}, stream);
}
