// Backward of the chunk form (gated_delta.md, 2.4 and the rectangle form of dg, 2.5). One task =
// one q/k head of one sequence with all its value heads, so that dq and dk need no reduction.
//
// If the forward saved nothing, the states are recomputed: a sweep forward keeps S at the first
// chunk of every segment; then, from the last segment to the first, the segment's chunks are run
// again, keeping what `SavedLayout` names, and walked backwards. A segment is the whole sequence
// while that stays below kSavedBytes a worker.
#include "gated_delta/chunk_grads.h"
#include "gated_delta/chunk_save.h"

namespace df::cpu::DF_ISA {
namespace {
constexpr int64_t kSavedBytes = 64 << 20, kSegment = 16;

// Chunks a segment, and segments of the longest sequence.
template <class T>
struct Plan {
  int64_t chunks, segments;
  Plan(const ChunkShape& s, int64_t longest) {
    const int64_t all = (longest + s.C - 1) / s.C;
    const int64_t bytes = all * s.group() * SavedLayout(s).elements() * int64_t(sizeof(T));
    chunks = bytes <= kSavedBytes ? (all ? all : 1) : kSegment;
    segments = (all + chunks - 1) / chunks;
  }
};

template <class T>
struct Worker {
  const ChunkBwdArgs& p;
  const ChunkInputs& in;
  const ChunkShape& s;
  Plan<T> plan;
  SavedLayout layout;
  int64_t ldk, ldv, state;
  StepKeys<T> step_keys;
  StepTables<T> step_tables;
  StepPanels<T> step;
  KeyPanels<T> keys;
  GradPanels<T> b;
  T *checkpoints, *saved;
  Sequence seq;
  ChunkTask task;

  Worker(Arena& a, const ChunkBwdArgs& p, int64_t longest)
      : p(p),
        in(p.in),
        s(p.in.shape),
        plan(s, longest),
        layout(s),
        ldk(round_up<T>(s.K)),
        ldv(round_up<T>(s.V)),
        state(ldk * ldv),
        step_keys(a, s),
        step_tables(a, s),
        step(a),
        keys(a, s),
        b(a, s) {
    if (p.saved) return;
    checkpoints = a.take<T>(plan.segments * s.group() * state);
    saved = a.take<T>(plan.chunks * s.group() * layout.elements());
  }

  T* slot(int64_t chunk_in_segment, int64_t head) const {
    return saved + (chunk_in_segment * s.group() + head) * layout.elements();
  }
  const T* slot_of_forward(int64_t chunk, int64_t head) const {
    const int64_t slot = saved_slot(s, seq, task.sequence) + chunk;
    return static_cast<const T*>(p.saved) + (slot * s.HV + task.first + head) * layout.elements();
  }

  int64_t rows(int64_t chunk) const {
    const int64_t left = seq.end - seq.begin - chunk * s.C;
    return left < s.C ? left : s.C;
  }

  // The tile of a head's state that starts at column v.
  T* tile(int64_t head, int64_t v) const { return b.states + head * state + v * ldk; }
  template <class Fn>
  void tiles(Fn fn) const {
    for (int64_t v = 0; v < s.V; v += kTileColumns<T>) {
      const int64_t n = s.V - v < kTileColumns<T> ? s.V - v : kTileColumns<T>;
      fn(v, n, round_up<T>(n));
    }
  }

  // Chunks [first, last) from the states in b.states; keeps what the backward needs if asked.
  void sweep(int64_t first, int64_t last, bool keep) {
    for (int64_t c = first; c < last; ++c) {
      const int64_t begin = seq.begin + c * s.C, n = rows(c);
      step_keys.load(in, seq.batch, begin, task.first / s.group(), n, false);
      for (int64_t h = 0; h < s.group(); ++h) {
        step_tables.load(in, step_keys, seq.batch, begin, task.first + h, n);
        tiles([&](int64_t v, int64_t columns, int64_t ld) {
          sweep_tile(begin, h, n, v, columns, ld, keep ? slot(c - first, h) : nullptr);
        });
      }
    }
  }
  void sweep_tile(int64_t begin, int64_t head, int64_t n, int64_t v, int64_t columns, int64_t ld,
                  T* to) {
    T* S = tile(head, v);
    if (to) save_state<false>(s, S, ld, to + v * layout.K);
    for (int64_t i = 0; i < n; i += kStep) {
      const int64_t m = n - i < kStep ? n - i : kStep;
      load_panel(in.v, seq.batch, begin + i, task.first + head, m, columns, v, step.v, ld);
      Ahead none;
      run_step<false>(in, step_keys, step_tables, step, i / kStep, m, S, ld, none);
      if (to) save_rows<false>(step.e, ld, m, to + layout.e() + i * layout.V + v, layout.V);
    }
  }

  Saved<T> kept(int64_t chunk, int64_t first, int64_t head) const {
    return {layout, p.saved ? slot_of_forward(chunk, head) : slot(chunk - first, head)};
  }

  // What the walk reads at the chunk before this one, for one head.
  Ahead before(int64_t chunk, int64_t first, int64_t head) const {
    Ahead ahead;
    if (chunk == first) return ahead;
    const int64_t begin = seq.begin + (chunk - 1) * s.C, key_head = task.first / s.group();
    if (p.saved) ahead.add(kept(chunk - 1, first, head).S_T, layout.elements() * sizeof(T));
    ahead.add(p.d_o, seq.batch, begin, task.first + head, s.C, 0, s.V);
    if (head == s.group() - 1) {
      ahead.add(in.q, seq.batch, begin, key_head, s.C, 0, s.K);
      ahead.add(in.k, seq.batch, begin, key_head, s.C, 0, s.K);
    }
    constexpr int64_t block = kGemmRows * kGemmCols * kLanes<T>;  // of a product
    ahead.pace(6 * s.C * s.K * s.V / (block * kPause) + 1);
    return ahead;
  }

  void walk_back(int64_t first, int64_t last) {
    for (int64_t c = last - 1; c >= first; --c) {
      const int64_t begin = seq.begin + c * s.C, n = rows(c);
      keys.load(in, seq.batch, begin, task.first / s.group(), n);
      for (int64_t h = 0; h < s.group(); ++h) {
        Ahead ahead = before(c, first, h);
        head_gradients(p, keys, b, kept(c, first, h), b.dstates + h * state, seq.batch, begin,
                       task.first + h, n, b.sums + 2 * h, ahead);
      }
      key_gradients(p, keys, b, seq.batch, begin, task.first / s.group(), n);
    }
  }

  void by_segments(int64_t chunks) {
    const int64_t segments = (chunks + plan.chunks - 1) / plan.chunks, size = s.group() * state;
    const auto last = [&](int64_t segment) {
      const int64_t end = (segment + 1) * plan.chunks;
      return end < chunks ? end : chunks;
    };
    for (int64_t i = 0; i < segments; ++i) {
      __builtin_memcpy(checkpoints + i * size, b.states, size * sizeof(T));
      if (i + 1 < segments) sweep(i * plan.chunks, last(i), false);
    }
    for (int64_t i = segments - 1; i >= 0; --i) {
      __builtin_memcpy(b.states, checkpoints + i * size, size * sizeof(T));
      sweep(i * plan.chunks, last(i), true);
      walk_back(i * plan.chunks, last(i));
    }
  }

  void run(const ChunkTask& work) {
    task = work, seq = in.sequences[work.sequence];
    const int64_t chunks = (seq.end - seq.begin + s.C - 1) / s.C, G = s.group();
    for (int64_t h = 0; h < G; ++h) {
      const int64_t index = task.sequence * s.HV + task.first + h;
      tiles([&](int64_t v, int64_t n, int64_t ld) {
        load_state(in, in.initial_state, index, v, n, tile(h, v), ld);
      });
      load_state(in, p.d_final_state, index, 0, s.V, b.dstates + h * state, ldv);
      b.sums[2 * h] = b.sums[2 * h + 1] = 0;
    }
    p.saved ? walk_back(0, chunks) : by_segments(chunks);
    for (int64_t h = 0; h < G; ++h) {
      const int64_t index = task.sequence * s.HV + task.first + h;
      if (p.d_initial_state)
        store_state(in, b.dstates + h * state, ldv, index, 0, s.V, p.d_initial_state);
      if (p.dA_log) p.dA_log[index] = b.sums[2 * h];
      if (p.ddt_bias) p.ddt_bias[index] = b.sums[2 * h + 1];
    }
  }
};

template <class T>
void run(const ChunkBwdArgs& p, int64_t longest, const ChunkTask& task, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  Worker<T>(arena, p, longest).run(task);
  stream_end();
}
}  // namespace

void chunk_bwd_scratch(const ChunkBwdArgs& p, int64_t longest, int64_t* bytes) {
  Arena arena{nullptr};
  if (p.in.q.dtype == DType::f64)
    Worker<double>(arena, p, longest);
  else
    Worker<float>(arena, p, longest);
  *bytes = arena.used;
}

void chunk_bwd(const ChunkBwdArgs& p, int64_t longest, const ChunkTask& task, void* scratch) {
  p.in.q.dtype == DType::f64 ? run<double>(p, longest, task, scratch)
                             : run<float>(p, longest, task, scratch);
}
}  // namespace df::cpu::DF_ISA
