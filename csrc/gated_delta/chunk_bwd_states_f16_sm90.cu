// chunk_bwd_states.cuh for f16 on wgmma; inputs that TMA cannot address go to mma.sync.
#include "gated_delta/chunk_bwd_states.cuh"

int df::chunk_bwd_states_f16_sm90(const ChunkBwdCuda& args, void* stream) {
  int error = 0;
  if (cuda::chunk_bwd_states_async<f16>(args, stream, &error)) return error;
  return chunk_bwd_states_f16(args, stream);
}
