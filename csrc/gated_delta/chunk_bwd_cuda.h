// The seam of the backward of the chunk form on CUDA (gated_delta.md, 2.4 and 2.5): three launches.
//   states  sequential over the chunks of a value head: dv, dstates, d_initial_state
//   chunks  all chunks side by side: dq, dk, dg, dbeta and partial sums for A_log and dt_bias
//   sums    the partial sums of all chunks, in their order
// Chains may be cut into segments (chunk_segments.h), from the last to the first: with `summary`,
// `states` leaves of each, in rows of V, dH^T and, in rows of K, M of dS^T_in = dS^T_out M + dH^T
// (the last segment's dH is made with d_final_state); the scan makes of them the dS that leaves
// each segment, from which `states` then starts. Outputs are contiguous. Tokens behind the last
// sequence get gradients of zero.
#pragma once
#include "gated_delta/chunk_segments.h"

namespace df {
struct ChunkBwdCuda {
  ChunkCuda in;
  Input d_o;
  const float* d_final_state;  // [N,HV,K,V], or [N,HV,V,K] v-first; may be null
  BySlot inverse, states;      // of the forward
  BySlot dstates;              // gradients of the states that leave chunks: written, then read
  void *dq, *dk, *dv;          // in the inputs' type; `chunks` reads dv, which is dW
  float *dg, *dbeta;           // [B,T,HV], of the arguments g and beta, through gate, sigmoid
  float* d_initial_state;      // as d_final_state; may be null
  double *dA_log, *ddt_bias;   // [slots,HV], a partial sum each; may be null
  float *dA_log_sum, *ddt_bias_sum;  // [HV]; null with the partial sums
  Segments segments;
  bool summary;
};

// Of 16-bit types: on mma.sync, and on wgmma (null in a build without sm_90a); `states` there needs
// q, k and d_o that TMA loads (chunk_tma.h). They return a cudaError_t of what precedes the launch.
int chunk_bwd_states_f32(const ChunkBwdCuda& args, void* stream);
int chunk_bwd_states_bf16(const ChunkBwdCuda& args, void* stream);
int chunk_bwd_states_f16(const ChunkBwdCuda& args, void* stream);
[[gnu::weak]] int chunk_bwd_states_bf16_sm90(const ChunkBwdCuda& args, void* stream);
[[gnu::weak]] int chunk_bwd_states_f16_sm90(const ChunkBwdCuda& args, void* stream);

int chunk_bwd_chunks_f32(const ChunkBwdCuda& args, void* stream);
int chunk_bwd_chunks_f32_wide(const ChunkBwdCuda& args, void* stream);  // K > 128
int chunk_bwd_chunks_bf16(const ChunkBwdCuda& args, void* stream);
int chunk_bwd_chunks_f16(const ChunkBwdCuda& args, void* stream);
[[gnu::weak]] int chunk_bwd_chunks_bf16_sm90(const ChunkBwdCuda& args, void* stream);
[[gnu::weak]] int chunk_bwd_chunks_f16_sm90(const ChunkBwdCuda& args, void* stream);

void chunk_bwd_sums(const ChunkBwdCuda& args, void* stream);
}  // namespace df
