// The seam of the per-token form: the chunk form's arguments and the channels that only it has.
#pragma once
#include "common/sequences.h"
#include "gated_delta/chunk.h"

namespace df {
struct RecurrentInputs {
  ChunkInputs in;         // g or beta may be absent: no decay, beta = 1; shape.C: see backward
  Input gk, gv;           // [B,T,HV,K], [B,T,HV,V]: log-decays of rows and columns; may be absent
  bool beta_per_channel;  // beta is [B,T,HV,V]
};

struct RecurrentFwdArgs {
  RecurrentInputs x;
  void* o;
  void* final_state;  // may be null
};

// As in ChunkBwdArgs, but dg and dbeta may be null, and dbeta is of beta's shape.
struct RecurrentBwdArgs {
  RecurrentInputs x;
  Input d_o;
  State d_final_state;
  void *dq, *dk, *dv, *dg, *dbeta;
  void* d_initial_state;
  double *dA_log, *ddt_bias;
};

// CUDA, by the type of q, k and v; states are float. Sequences come from the offsets.
void recurrent_fwd_f32_cuda(const RecurrentFwdArgs& args, const Offsets& offsets, void* stream);
void recurrent_fwd_bf16_cuda(const RecurrentFwdArgs& args, const Offsets& offsets, void* stream);
void recurrent_fwd_f16_cuda(const RecurrentFwdArgs& args, const Offsets& offsets, void* stream);

// What the backward on CUDA needs besides: how the state is cut, and where partial results go.
struct RecurrentBwdLaunch {
  RecurrentBwdArgs args;  // without the sums of dA_log and ddt_bias
  int64_t B;
  Offsets offsets;
  int64_t warps;            // of a CTA, a power of two
  float* checkpoints;       // [checkpoint_slots(), HV, tiles, state_floats]: each shape().C tokens
  float* starts;            // [start_slots(), HV, tiles, state_floats]: of a segment's blocks
  float* origins;           // [N, HV, tiles, state_floats]: initial states; null without
  float* keys;              // [tiles, B T HV, 2, K]: dq and dk of a tile of value columns
  float* gates;             // [tiles, 2, B T HV]: <dS, S~> and du.e
  float* sums;              // [sum_rows(), 2, HV]: of dA_log and ddt_bias
  void *dA_log, *ddt_bias;  // of the types of A_log and dt_bias; may be null

  static constexpr int64_t kMostWarps = 8, kSumThreads = 256, kSumTokens = 256;
  constexpr const ChunkShape& shape() const { return args.x.in.shape; }
  constexpr int64_t tile_k() const { return shape().K <= 64 ? 64 : shape().K <= 128 ? 128 : 256; }
  constexpr int64_t rows_per_warp() const { return shape().K <= 128 ? 16 : 8; }
  constexpr int64_t tile() const { return warps * rows_per_warp(); }
  constexpr int64_t tiles() const { return (shape().V + tile() - 1) / tile(); }
  constexpr int64_t state_floats() const { return tile() * tile_k(); }
  constexpr int64_t block() const { return shape().K <= 128 ? 8 : 4; }  // tokens
  // The first state of a sequence and of a segment is known, so that short sequences have none of
  // these: those of a sequence fit from (first token / distance) on. The states of blocks are of
  // one segment at a time.
  constexpr int64_t checkpoint_slots() const { return B * (shape().T / shape().C); }
  constexpr int64_t starts_each() const { return shape().C / block() - 1; }
  constexpr bool few_sequences() const {
    return offsets.N * starts_each() < B * (shape().T / block());
  }
  constexpr int64_t start_slots() const {
    return few_sequences() ? offsets.N * starts_each() : B * (shape().T / block());
  }
  constexpr int64_t tokens() const { return B * shape().T; }
  constexpr int64_t sum_rows() const { return (tokens() + kSumTokens - 1) / kSumTokens; }
};
void recurrent_bwd_f32_cuda(const RecurrentBwdLaunch& launch, void* stream);
void recurrent_bwd_bf16_cuda(const RecurrentBwdLaunch& launch, void* stream);
void recurrent_bwd_f16_cuda(const RecurrentBwdLaunch& launch, void* stream);
// From the partial results to dq, dk, dg, dbeta, dA_log and ddt_bias.
void recurrent_bwd_sums_cuda(const RecurrentBwdLaunch& launch, void* stream);

namespace cpu {
// Tasks of one value head, columns [v0, v1); of a whole group in the backward.
DF_DECLARE_CPU(recurrent_fwd_scratch, const RecurrentFwdArgs&, int64_t* bytes)
DF_DECLARE_CPU(recurrent_fwd, const RecurrentFwdArgs&, const ChunkTask&, void* scratch)
DF_DECLARE_CPU(recurrent_bwd_scratch, const RecurrentBwdArgs&, int64_t longest, int64_t* bytes)
DF_DECLARE_CPU(recurrent_bwd, const RecurrentBwdArgs&, int64_t longest, const ChunkTask&,
               void* scratch)
}  // namespace cpu
}  // namespace df
