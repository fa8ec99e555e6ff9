// Forward of the chunk form (gated_delta.md, 2.3), one task = the value heads of a q/k head (or
// some of them), some columns of V. Chunks in order; heads within a chunk share q^, k^, KK^T, QK^T.
// A head's chunk is walked tile by tile of V, a tile step by step (chunk_steps.h); the chunk size
// only says how often S is saved for the backward.
#include "gated_delta/chunk_save.h"

namespace df::cpu::DF_ISA {
namespace {
template <class T>
struct Forward {
  const ChunkFwdArgs& p;
  const ChunkInputs& in;
  const ChunkShape& s;
  StepKeys<T> keys;
  StepTables<T> t;
  StepPanels<T> b;
  T* states;
  int64_t state;
  ChunkTask task;

  Forward(Arena& a, const ChunkFwdArgs& p)
      : p(p),
        in(p.in),
        s(p.in.shape),
        keys(a, s),
        t(a, s),
        b(a),
        state(round_up<T>(s.K) * round_up<T>(s.V)) {
    states = a.take<T>(s.group() * state);
  }

  // Tiles of a head's state follow each other, each as [K, ld].
  template <class Fn>
  void tiles(int64_t head, Fn fn) {
    T* S = states + (head - task.first) * state;
    for (int64_t v = task.v0; v < task.v1; v += kTileColumns<T>) {
      const int64_t n = task.v1 - v < kTileColumns<T> ? task.v1 - v : kTileColumns<T>;
      fn(v, n, round_up<T>(n), S + (v - task.v0) * round_up<T>(s.K));
    }
  }

  // `slot`: where to save, or null.
  void chunk_of_head(int64_t batch, int64_t begin, int64_t head, int64_t rows, T* slot) {
    const SavedLayout to(s);
    t.load(in, keys, batch, begin, head, rows);
    tiles(head, [&](int64_t v, int64_t n, int64_t ld, T* S) {
      if (slot) save_state<true>(s, S, ld, slot + v * to.K);
      for (int64_t i = 0; i < rows; i += kStep) {
        const int64_t m = rows - i < kStep ? rows - i : kStep, token = begin + i;
        Ahead ahead;
        ahead.add(in.v, batch, token + s.C, head, m, v, n);
        if (head == task.first) {
          const int64_t key_head = head / s.group(), width = task.v1 - task.v0;
          const int64_t from = s.K * (v - task.v0) / width, end = s.K * (v + n - task.v0) / width;
          ahead.add(in.k, batch, token + s.C, key_head, m, from, end - from);
          ahead.add(in.q, batch, token + s.C, key_head, m, from, end - from);
        }
        ahead.pace(2 * kStep / kGemmRows * ((s.K + kPause - 1) / kPause));
        load_panel(in.v, batch, token, head, m, n, v, b.v, ld);
        run_step<true>(in, keys, t, b, i / kStep, m, S, ld, ahead);
        const int64_t first = ((batch * s.T + token) * s.HV + head) * s.V + v;
        store_rows(b.o, ld, m, n, in.q.dtype, p.o, first, s.HV * s.V, p.streaming);
        if (slot) save_rows<true>(b.e, ld, m, slot + to.e() + i * to.V + v, to.V);
      }
    });
  }

  void run(const ChunkTask& work) {
    task = work;
    const Sequence seq = in.sequences[task.sequence];
    for (int64_t h = task.first; h < task.last; ++h)
      tiles(h, [&](int64_t v, int64_t n, int64_t ld, T* S) {
        load_state(in, in.initial_state, task.sequence * s.HV + h, v, n, S, ld);
      });
    T* saved = static_cast<T*>(p.saved);
    const int64_t slot_elements = SavedLayout(s).elements();
    if (saved) saved += saved_slot(s, seq, task.sequence) * s.HV * slot_elements;
    for (int64_t begin = seq.begin; begin < seq.end; begin += s.C) {
      const int64_t rows = seq.end - begin < s.C ? seq.end - begin : s.C;
      keys.load(in, seq.batch, begin, task.first / s.group(), rows, true);
      for (int64_t h = task.first; h < task.last; ++h)
        chunk_of_head(seq.batch, begin, h, rows, saved ? saved + h * slot_elements : nullptr);
      if (saved) saved += s.HV * slot_elements;
    }
    stream_end();
    for (int64_t h = task.first; p.final_state && h < task.last; ++h)
      tiles(h, [&](int64_t v, int64_t n, int64_t ld, T* S) {
        store_state(in, S, ld, task.sequence * s.HV + h, v, n, p.final_state);
      });
  }
};
}  // namespace

void chunk_fwd_scratch(const ChunkFwdArgs& p, int64_t* bytes) {
  Arena arena{nullptr};
  if (p.in.q.dtype == DType::f64)
    Forward<double>(arena, p);
  else
    Forward<float>(arena, p);
  *bytes = arena.used;
}

void chunk_fwd(const ChunkFwdArgs& p, const ChunkTask& task, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  p.in.q.dtype == DType::f64 ? Forward<double>(arena, p).run(task)
                             : Forward<float>(arena, p).run(task);
}
}  // namespace df::cpu::DF_ISA
