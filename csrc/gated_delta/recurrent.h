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

namespace cpu {
// Tasks of one value head, columns [v0, v1); of a whole group in the backward.
DF_DECLARE_CPU(recurrent_fwd_scratch, const RecurrentFwdArgs&, int64_t* bytes)
DF_DECLARE_CPU(recurrent_fwd, const RecurrentFwdArgs&, const ChunkTask&, void* scratch)
DF_DECLARE_CPU(recurrent_bwd_scratch, const RecurrentBwdArgs&, int64_t longest, int64_t* bytes)
DF_DECLARE_CPU(recurrent_bwd, const RecurrentBwdArgs&, int64_t longest, const ChunkTask&,
               void* scratch)
}  // namespace cpu
}  // namespace df
