// The seam of the chunk form: plain arguments of the CPU kernels. Shapes are the spec's:
// q, k [B,T,H,K]; v, o [B,T,HV,V]; g, beta [B,T,HV]; states [N,HV,K,V], or [N,HV,V,K] v-first.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"
#include "gated_delta/input.h"

namespace df {
// One sequence: tokens [begin, end) of row `batch`.
struct Sequence {
  int64_t batch, begin, end;
};

struct ChunkShape {
  int64_t T, H, HV, K, V, C;
  int64_t group() const { return HV / H; }
};

struct ChunkInputs {
  ChunkShape shape;
  Input q, k, v, g, beta;
  State initial_state;
  const Sequence* sequences;
  PreActivation pre;
  double scale;
  bool l2norm, state_v_first;
};

// Outputs are contiguous. o, dq, dk, dv have q's dtype; states and partial sums the compute type.
struct ChunkFwdArgs {
  ChunkInputs in;
  void* o;
  void* final_state;  // may be null
};

struct ChunkBwdArgs {
  ChunkInputs in;
  Input d_o;
  State d_final_state;
  void *dq, *dk, *dv, *dg, *dbeta;  // dg, dbeta [B,T,HV] in the compute type
  void* d_initial_state;            // may be null
  double *dA_log, *ddt_bias;        // [N,HV], one partial sum a sequence; may be null
};

// Work of one call: value heads [first, last) of one q/k head, value columns [v0, v1).
struct ChunkTask {
  int64_t sequence, first, last, v0, v1;
};

namespace cpu {
// Scratch is zeroed and 64-byte aligned; one worker uses the same for all its tasks.
DF_DECLARE_CPU(chunk_fwd_scratch, const ChunkFwdArgs&, int64_t* bytes)
DF_DECLARE_CPU(chunk_fwd, const ChunkFwdArgs&, const ChunkTask&, void* scratch)
DF_DECLARE_CPU(chunk_bwd_scratch, const ChunkBwdArgs&, int64_t longest, int64_t* bytes)
DF_DECLARE_CPU(chunk_bwd, const ChunkBwdArgs&, int64_t longest, const ChunkTask&, void* scratch)
}  // namespace cpu
}  // namespace df
