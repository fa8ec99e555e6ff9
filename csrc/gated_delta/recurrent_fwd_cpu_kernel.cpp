// Forward of the per-token form (gated_delta.md, 2.1): one task = one value head of one sequence, a
// tile of value columns that keeps S in the first-level cache. A token reads S twice and writes it
// once, 3 K V multiply-adds; it is bound by the ports for loads and multiply-adds about equally.
#include "gated_delta/recurrent_step.h"

namespace df::cpu::DF_ISA {
namespace {
template <class T>
struct Worker {
  const RecurrentFwdArgs& p;
  const ChunkInputs& in;
  int64_t ldk, panel;
  T* S;
  Token<T> token;

  Worker(Arena& a, const RecurrentFwdArgs& p)
      : p(p),
        in(p.x.in),
        ldk(round_up<T>(in.shape.K)),
        panel(ldk * round_up<T>(in.shape.V)),
        S(a.take<T>(panel)),
        token(a, ldk, round_up<T>(in.shape.V)) {}

  void run(const ChunkTask& task) {
    const ChunkShape& s = in.shape;
    const Sequence seq = in.sequences[task.sequence];
    const int64_t h = task.first, v0 = task.v0, n = task.v1 - v0, ld = round_up<T>(n);
    const Gate head = head_gate(in.pre, h);
    load_state(in, in.initial_state, task.sequence * s.HV + h, v0, n, S, ld);
    for (int64_t t = seq.begin; t < seq.end; ++t) {
      load_key(in, in.k, seq.batch, t, h / s.group(), token.k);
      load_key(in, in.q, seq.batch, t, h / s.group(), token.q);
      scale_row(token.q, T(in.scale), ldk);
      load_value(p.x, head, seq.batch, t, h, v0, n, token);
      p.x.gk.data ? step<T, true>(token, s.K, ld, S, S) : step<T, false>(token, s.K, ld, S, S);
      store_rows(token.o, ld, 1, n, in.q.dtype, p.o, ((seq.batch * s.T + t) * s.HV + h) * s.V + v0,
                 0);
    }
    if (p.final_state) store_state(in, S, ld, task.sequence * s.HV + h, v0, n, p.final_state);
  }
};

template <class T>
void run(const RecurrentFwdArgs& p, const ChunkTask& task, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  Worker<T>(arena, p).run(task);
}
}  // namespace

void recurrent_fwd_scratch(const RecurrentFwdArgs& p, int64_t* bytes) {
  Arena arena{nullptr};
  if (p.x.in.q.dtype == DType::f64)
    Worker<double>(arena, p);
  else
    Worker<float>(arena, p);
  *bytes = arena.used;
}

void recurrent_fwd(const RecurrentFwdArgs& p, const ChunkTask& task, void* scratch) {
  p.x.in.q.dtype == DType::f64 ? run<double>(p, task, scratch) : run<float>(p, task, scratch);
}
}  // namespace df::cpu::DF_ISA
