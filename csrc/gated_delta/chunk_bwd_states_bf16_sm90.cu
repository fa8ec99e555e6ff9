// chunk_bwd_states.cuh for bf16 on wgmma.
#include "gated_delta/chunk_bwd_states.cuh"

int df::chunk_bwd_states_bf16_sm90(const ChunkBwdCuda& args, void* stream) {
  return cuda::chunk_bwd_states_tma<bf16>(args, stream);
}
