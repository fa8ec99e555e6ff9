// Forward of the chunk form (gated_delta.md, 2.3), one task = the value heads of a q/k head (or
// some of them), a tile of value columns. Chunks in order; heads within a chunk share q^, k^, KK^T,
// QK^T. Per chunk and head, in panels that stay in L2:
//   L = strictlower(Gam o KK^T)   T' = (I + L diag(beta))^-1   E = T' (V - gam o KS)   U = beta o E
//   O = sc (gam o QS + P U), P = Gam o QK^T                    S <- e^{G_C} S + K^T (del o U)
#include "gated_delta/chunk_tables.h"

namespace df::cpu::DF_ISA {
namespace {
template <class T>
struct FwdPanels {
  KeyPanels<T> keys;
  Tables<T> t;
  T *states, *v, *ks, *w, *e, *o, *lower, *inverse;
  FwdPanels(Arena& a, const ChunkShape& s) : keys(a, s), t(a, s) {
    const int64_t ldv = round_up<T>(s.V), panel = s.C * ldv;
    states = a.take<T>(s.group() * round_up<T>(s.K) * ldv);
    v = a.take<T>(panel), ks = a.take<T>(panel), w = a.take<T>(panel);
    e = a.take<T>(panel), o = a.take<T>(panel);
    lower = a.take<T>(s.C * keys.ldc), inverse = a.take<T>(s.C * keys.ldc);
  }
};

// `slot`: where to save, or null.
template <class T>
void head_chunk(const ChunkFwdArgs& p, const ChunkTask& task, FwdPanels<T>& b, int64_t batch,
                int64_t begin, int64_t head, int64_t rows, T* slot) {
  const ChunkInputs& in = p.in;
  const int64_t n = task.v1 - task.v0, ldv = round_up<T>(n), ldc = b.keys.ldc, K = in.shape.K;
  T* S = b.states + (head - task.first) * round_up<T>(K) * ldv;
  b.t.load(in, batch, begin, head, rows);
  load_panel(in.v, batch, begin, head, rows, n, task.v0, b.v, ldv, in.shape.C);

  lower_product<true, T>(b.t.decay, b.keys.kk, nullptr, 1, rows, ldc, b.lower);
  invert(b.lower, b.t.beta, rows, ldc, b.inverse);
  errors(in, b.keys, b.t, b.inverse, b.v, S, rows, ldv, b.ks, b.w, b.e);
  if (slot) save_chunk<true>(b.keys, in.shape, S, b.e, ldv, b.inverse, task.v0, rows, slot);
  T* u = b.w;
  scale_rows(b.e, b.t.beta, T(1), rows, ldv, u);

  gemm(rows, ldv, K, plain(b.keys.q, b.keys.ldk), S, ldv, b.o, ldv);
  scale_rows(b.o, b.t.gam, T(in.scale), rows, ldv, b.o);
  lower_product<false, T>(b.t.decay, b.keys.qk, nullptr, T(in.scale), rows, ldc, b.lower);
  gemm<Into::add, Shape::lower>(rows, ldv, rows, plain(b.lower, ldc), u, ldv, b.o, ldv);
  const int64_t first = ((batch * in.shape.T + begin) * in.shape.HV + head) * in.shape.V + task.v0;
  store_rows(b.o, ldv, rows, n, in.q.dtype, p.o, first, in.shape.HV * in.shape.V, p.streaming);
  advance(in, b.keys, b.t, u, rows, ldv, b.e, S);
}

template <class T>
void run(const ChunkFwdArgs& p, const ChunkTask& task, void* scratch) {
  const ChunkInputs& in = p.in;
  const ChunkShape& s = in.shape;
  const int64_t n = task.v1 - task.v0, ldv = round_up<T>(n), state = round_up<T>(s.K) * ldv;
  const Sequence seq = in.sequences[task.sequence];
  Arena arena{static_cast<char*>(scratch)};
  FwdPanels<T> b(arena, s);
  for (int64_t h = task.first; h < task.last; ++h)
    load_state(in, in.initial_state, task.sequence * s.HV + h, task.v0, n,
               b.states + (h - task.first) * state, ldv);
  T* saved = static_cast<T*>(p.saved);
  const int64_t slot_elements = SavedLayout(s).elements();
  if (saved) saved += saved_slot(s, seq, task.sequence) * s.HV * slot_elements;
  for (int64_t begin = seq.begin; begin < seq.end; begin += s.C) {
    const int64_t rows = seq.end - begin < s.C ? seq.end - begin : s.C;
    b.keys.load(in, seq.batch, begin, task.first / s.group(), rows, true, s.C);
    for (int64_t h = task.first; h < task.last; ++h)
      head_chunk(p, task, b, seq.batch, begin, h, rows,
                 saved ? saved + h * slot_elements : nullptr);
    if (saved) saved += s.HV * slot_elements;
  }
  stream_end();
  if (!p.final_state) return;
  for (int64_t h = task.first; h < task.last; ++h)
    store_state(in, b.states + (h - task.first) * state, ldv, task.sequence * s.HV + h, task.v0, n,
                p.final_state);
}
}  // namespace

void chunk_fwd_scratch(const ChunkFwdArgs& p, int64_t* bytes) {
  Arena arena{nullptr};
  if (p.in.q.dtype == DType::f64)
    FwdPanels<double>(arena, p.in.shape);
  else
    FwdPanels<float>(arena, p.in.shape);
  *bytes = arena.used;
}

void chunk_fwd(const ChunkFwdArgs& p, const ChunkTask& task, void* scratch) {
  p.in.q.dtype == DType::f64 ? run<double>(p, task, scratch) : run<float>(p, task, scratch);
}
}  // namespace df::cpu::DF_ISA
