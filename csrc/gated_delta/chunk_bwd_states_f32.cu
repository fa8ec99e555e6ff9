// chunk_bwd_states.cuh for float, as three products of TF32 on mma.sync.
#include "gated_delta/chunk_bwd_states.cuh"

int df::chunk_bwd_states_f32(const ChunkBwdCuda& args, void* stream) {
  return cuda::chunk_bwd_states_by_size<cuda::Sm80, float>(args, {}, stream);
}
