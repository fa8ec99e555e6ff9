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
  constexpr int64_t group() const { return HV / H; }
};

// What a chunk of a value head can leave to its backward, in the compute type: S^T of the state
// that entered [V, K] and E [C, V]. Rows and columns are padded to 16, whatever the instruction
// set; the padding holds anything.
struct SavedLayout {
  int64_t K, V, C;
  explicit SavedLayout(const ChunkShape& s) : K(pad(s.K)), V(pad(s.V)), C(pad(s.C)) {}
  int64_t e() const { return V * K; }
  int64_t elements() const { return e() + C * V; }
  static int64_t pad(int64_t n) { return (n + 15) / 16 * 16; }
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
  void* saved;        // [slots, HV, SavedLayout]; may be null
  bool streaming;     // of o
};

struct ChunkBwdArgs {
  ChunkInputs in;
  Input d_o;
  State d_final_state;
  const void* saved;                      // by the forward; may be null
  void *dq, *dk, *dv, *dg, *dbeta;        // dg, dbeta [B,T,HV] in the compute type
  void* d_initial_state;                  // may be null
  double *dA_log, *ddt_bias;              // [N,HV], one partial sum a sequence; may be null
  bool streaming_keys, streaming_values;  // of dq and dk, of dv
};

// Whether results of that many float or double elements go past the caches: they are larger than
// the second-level cache of two cores, so that nothing of them would be found there, and their rows
// of n elements are whole vectors.
inline bool streams(DType dtype, int64_t elements, int64_t n) {
  const int64_t size = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 0;
  return elements * size >= (8 << 20) && n * size % 64 == 0;
}

// Slots of a call in `saved`, and the first of a sequence; a packed sequence may leave one unused.
inline int64_t saved_slots(const ChunkShape& s, int64_t batches, int64_t sequences, bool packed) {
  return packed ? s.T / s.C + sequences : batches * ((s.T + s.C - 1) / s.C);
}
inline int64_t saved_slot(const ChunkShape& s, const Sequence& x, int64_t sequence) {
  return x.batch * ((s.T + s.C - 1) / s.C) + x.begin / s.C + sequence - x.batch;
}

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
