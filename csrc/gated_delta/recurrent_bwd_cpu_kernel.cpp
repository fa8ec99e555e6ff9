// Backward of the per-token form (gated_delta.md, 2.6): one task = one q/k head of one sequence
// with all its value heads, so that dq and dk are sums within a task. For t = T..1, with S the
// state before the token, S~ = e^g S and the gradient dS of the state after it:
//   dS += sc q dO^T;   dq = sc (S~ dO + (u.dO) k);   du = dS^T k;   dv = beta du;   dbeta = du.e
//   dk = dS u - S~ dv, with dS before and after:   dS -= k dv^T;   dg = <dS, S~>;   dS *= e^g
//
// A sweep forward keeps the state at every C-th token (shape.C); then each segment, the last first,
// is run again with all its states kept, and walked backwards: C + T / C states, not T.
#include "gated_delta/recurrent_step.h"

namespace df::cpu::DF_ISA {
namespace {
// One token backwards. Sums over columns stay vectors: lanes [ldk][L] a row of S.
template <class T>
struct Reverse {
  T *dO, *read_dO, *du, *dv, *read_dv, *lanes_q, *lanes_k;
  Reverse(Arena& a, int64_t ldk, int64_t ld) {
    dO = a.take<T>(ld), read_dO = a.take<T>(ld), du = a.take<T>(ld);
    dv = a.take<T>(ld), read_dv = a.take<T>(ld);
    lanes_q = a.take<T>(ldk * kLanes<T>), lanes_k = a.take<T>(ldk * kLanes<T>);
  }
};

template <class T>
inline void multiply_rows(const T* x, const T* y, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store(to + i, load(x + i) * load(y + i));
}

// dS += sc q dO^T; du = dS^T k; lanes of S~ dO and of dS u.
template <class T, int kCols>
inline void add_output(const Token<T>& x, const Reverse<T>& r, T scale, int64_t K, int64_t ld,
                       int64_t column, const T* S, T* dS) {
  constexpr int L = kLanes<T>;
  Vec<T> dO[kCols], read_dO[kCols], u[kCols], du[kCols] = {};
#pragma GCC unroll 4
  for (int j = 0; j < kCols; ++j) {
    dO[j] = load(r.dO + column + j * L), u[j] = load(x.u + column + j * L);
    read_dO[j] = load(r.read_dO + column + j * L);
  }
  for (int64_t i = 0; i < K; ++i) {
    const Vec<T> q = splat(x.q[i] * scale), k = splat(x.k[i]);
    Vec<T> to_q{}, to_k{};
    if (column) to_q = load(r.lanes_q + i * L), to_k = load(r.lanes_k + i * L);
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      const int64_t at = i * ld + column + j * L;
      const Vec<T> d = load(dS + at) + q * dO[j];
      store(dS + at, d);
      du[j] += k * d;
      to_k += d * u[j];
      to_q += load(S + at) * read_dO[j];
    }
    store(r.lanes_q + i * L, to_q), store(r.lanes_k + i * L, to_k);
  }
#pragma GCC unroll 4
  for (int j = 0; j < kCols; ++j) store(r.du + column + j * L, du[j]);
}

// dS -= k dv^T; <dS, S>; lanes of -S~ dv; dS *= e^g.
template <class T, int kCols>
inline Vec<T> subtract_read(const Token<T>& x, const Reverse<T>& r, int64_t K, int64_t ld,
                            int64_t column, const T* S, T* dS) {
  constexpr int L = kLanes<T>;
  Vec<T> dv[kCols], read_dv[kCols], inner[kCols] = {};
  const T decay = x.decay[0];
#pragma GCC unroll 4
  for (int j = 0; j < kCols; ++j) {
    dv[j] = load(r.dv + column + j * L), read_dv[j] = load(r.read_dv + column + j * L);
  }
  for (int64_t i = 0; i < K; ++i) {
    const Vec<T> k = splat(x.k[i]);
    Vec<T> to_k = load(r.lanes_k + i * L);
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      const int64_t at = i * ld + column + j * L;
      const Vec<T> d = load(dS + at) - k * dv[j], s = load(S + at);
      inner[j] += d * s;
      to_k -= s * read_dv[j];
      store(dS + at, d * decay);
    }
    store(r.lanes_k + i * L, to_k);
  }
  for (int j = 1; j < kCols; ++j) inner[0] += inner[j];
  return inner[0];
}

// to[i] += factor * (sum of the lanes of row i + more * extra[i]), whole blocks of rows at a time.
template <class T>
inline void add_lanes(const T* lanes, const T* extra, T more, T factor, int64_t ldk, T* to) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < ldk; i += L) {
    T block[L * L];
    transpose_block(lanes + i * L, L, block, L);
    Vec<T> total = load(extra + i) * more;
    for (int l = 0; l < L; ++l) total += load(block + l * L);
    store(to + i, load(to + i) + total * factor);
  }
}

template <class T>
struct Worker {
  const RecurrentBwdArgs& p;
  const ChunkInputs& in;
  const ChunkShape& s;
  int64_t ldk, ld, state, segments, kept;
  T *q, *k, *rq, *rk, *dq, *dk, *e, *u, *zero;  // rows of a segment
  T *checkpoints, *trace, *dstates;
  double* sums;  // a head: sum dg g, sum da
  Token<T> token;
  Reverse<T> rev;
  Sequence seq;

  Worker(Arena& a, const RecurrentBwdArgs& p, int64_t longest)
      : p(p),
        in(p.x.in),
        s(in.shape),
        ldk(round_up<T>(s.K)),
        ld(round_up<T>(s.V)),
        state(ldk * ld),
        segments((longest + s.C - 1) / s.C),
        kept(longest < s.C ? longest : s.C),
        token(a, ldk, ld),
        rev(a, ldk, ld) {
    q = a.take<T>(kept * ldk), k = a.take<T>(kept * ldk), zero = a.take<T>(ldk);
    dq = a.take<T>(kept * ldk), dk = a.take<T>(kept * ldk);
    rq = a.take<T>(kept), rk = a.take<T>(kept);
    e = a.take<T>(kept * ld), u = a.take<T>(kept * ld);
    sums = a.take<double>(2 * s.group()), dstates = a.take<T>(s.group() * state);
    trace = a.take<T>((kept + 1) * state);
    checkpoints = a.take<T>((segments ? segments : 1) * s.group() * state);
  }

  T* checkpoint(int64_t segment, int64_t head) const {
    return checkpoints + (segment * s.group() + head) * state;
  }

  void load_keys(int64_t key_head, int64_t begin, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      rk[i] = load_key(in, in.k, seq.batch, begin + i, key_head, k + i * ldk);
      rq[i] = load_key(in, in.q, seq.batch, begin + i, key_head, q + i * ldk);
    }
  }

  // n tokens from the state S; the states after them go to S + stride, S + 2 stride, ...
  void forward(int64_t head, int64_t begin, int64_t n, T* S, int64_t stride) {
    const Gate gate_of_head = head_gate(in.pre, head);
    token.q = zero;
    for (int64_t i = 0; i < n; ++i, S += stride) {
      token.k = k + i * ldk, token.e = e + i * ld, token.u = u + i * ld;
      load_value(p.x, gate_of_head, seq.batch, begin + i, head, 0, s.V, token);
      step<T, false>(token, s.K, ld, S, S + stride);
    }
  }

  // Token i of the segment; dS of the state after it becomes that of the state before it.
  void backward(int64_t head, int64_t begin, int64_t i, Gate gate_of_head, T* dS, double* total) {
    constexpr int64_t kBlock = kStepCols * kLanes<T>;
    const T *S = trace + i * state, scale = T(in.scale);
    token.q = q + i * ldk, token.k = k + i * ldk, token.e = e + i * ld, token.u = u + i * ld;
    load_value(p.x, gate_of_head, seq.batch, begin + i, head, 0, s.V, token);
    load_panel(p.d_o, seq.batch, begin + i, head, 1, s.V, 0, rev.dO, ld);
    multiply_rows(rev.dO, token.decay, ld, rev.read_dO);
    int64_t c = 0;
    for (; c + kBlock <= ld; c += kBlock)
      add_output<T, kStepCols>(token, rev, scale, s.K, ld, c, S, dS);
    for (; c < ld; c += kLanes<T>) add_output<T, 1>(token, rev, scale, s.K, ld, c, S, dS);

    multiply_rows(rev.du, token.beta, ld, rev.dv);
    multiply_rows(rev.dv, token.decay, ld, rev.read_dv);
    Vec<T> inner{};
    for (c = 0; c + kBlock <= ld; c += kBlock)
      inner += subtract_read<T, kStepCols>(token, rev, s.K, ld, c, S, dS);
    for (; c < ld; c += kLanes<T>) inner += subtract_read<T, 1>(token, rev, s.K, ld, c, S, dS);

    add_lanes(rev.lanes_q, token.k, dot_row(token.u, rev.dO, ld), scale, ldk, dq + i * ldk);
    add_lanes(rev.lanes_k, token.k, T(0), T(1), ldk, dk + i * ldk);
    const int64_t at = (seq.batch * s.T + begin + i) * s.HV + head;
    store_rows(rev.dv, ld, 1, s.V, in.q.dtype, p.dv, at * s.V, 0);
    if (p.dg) gate_gradient(gate_of_head, double(token.decay[0]) * sum<T>(inner), at, total);
    if (p.dbeta) beta_gradient(at);
  }

  void gate_gradient(Gate gate_of_head, double dg, int64_t at, double* total) {
    dg = clamp_gate_bwd(token.g, dg);
    if (in.pre.A_log.data) {
      total[0] += dg * clamp_gate(token.g);
      dg *= gate_slope(gate_of_head, token.raw);
      total[1] += dg;
    }
    static_cast<T*>(p.dg)[at] = T(dg);
  }

  void beta_gradient(int64_t at) {
    const double m = in.pre.sigmoid_scale;
    T* to = static_cast<T*>(p.dbeta);
    if (!p.x.beta_per_channel) {
      const double d = dot_row(rev.du, token.e, ld);
      to[at] = T(m > 0 ? sigmoid_beta_bwd(token.beta[0], m, d) : d);
      return;
    }
    for (int64_t c = 0; c < s.V; ++c) {
      const double d = rev.du[c] * token.e[c];
      to[at * s.V + c] = T(m > 0 ? sigmoid_beta_bwd(token.beta[c], m, d) : d);
    }
  }

  void segment(const ChunkTask& task, int64_t index, int64_t begin, int64_t n) {
    const int64_t key_head = task.first / s.group();
    load_keys(key_head, begin, n);
    __builtin_memset(dq, 0, n * ldk * sizeof(T));
    __builtin_memset(dk, 0, n * ldk * sizeof(T));
    for (int64_t h = 0; h < s.group(); ++h) {
      const Gate gate_of_head = head_gate(in.pre, task.first + h);
      __builtin_memcpy(trace, checkpoint(index, h), state * sizeof(T));
      forward(task.first + h, begin, n, trace, state);
      for (int64_t i = n - 1; i >= 0; --i)
        backward(task.first + h, begin, i, gate_of_head, dstates + h * state, sums + 2 * h);
    }
    for (int64_t i = 0; in.l2norm && i < n; ++i) {
      l2norm_bwd(q + i * ldk, rq[i], dq + i * ldk, ldk);
      l2norm_bwd(k + i * ldk, rk[i], dk + i * ldk, ldk);
    }
    const int64_t first = ((seq.batch * s.T + begin) * s.H + key_head) * s.K, stride = s.H * s.K;
    store_rows(dq, ldk, n, s.K, in.q.dtype, p.dq, first, stride);
    store_rows(dk, ldk, n, s.K, in.q.dtype, p.dk, first, stride);
  }

  void run(const ChunkTask& task) {
    seq = in.sequences[task.sequence];
    const int64_t length = seq.end - seq.begin, G = s.group(), all = (length + s.C - 1) / s.C;
    for (int64_t h = 0; h < G; ++h) {
      const int64_t index = task.sequence * s.HV + task.first + h;
      load_state(in, in.initial_state, index, 0, s.V, checkpoint(0, h), ld);
      load_state(in, p.d_final_state, index, 0, s.V, dstates + h * state, ld);
      sums[2 * h] = sums[2 * h + 1] = 0;
    }
    for (int64_t i = 0; i + 1 < all; ++i) {
      load_keys(task.first / G, seq.begin + i * s.C, s.C);
      __builtin_memcpy(checkpoint(i + 1, 0), checkpoint(i, 0), G * state * sizeof(T));
      for (int64_t h = 0; h < G; ++h)
        forward(task.first + h, seq.begin + i * s.C, s.C, checkpoint(i + 1, h), 0);
    }
    for (int64_t i = all - 1; i >= 0; --i) {
      const int64_t left = length - i * s.C;
      segment(task, i, seq.begin + i * s.C, left < s.C ? left : s.C);
    }
    for (int64_t h = 0; h < G; ++h) {
      const int64_t index = task.sequence * s.HV + task.first + h;
      if (p.d_initial_state)
        store_state(in, dstates + h * state, ld, index, 0, s.V, p.d_initial_state);
      if (p.dA_log) p.dA_log[index] = sums[2 * h];
      if (p.ddt_bias) p.ddt_bias[index] = sums[2 * h + 1];
    }
  }
};

template <class T>
void run(const RecurrentBwdArgs& p, int64_t longest, const ChunkTask& task, void* scratch) {
  Arena arena{static_cast<char*>(scratch)};
  Worker<T>(arena, p, longest).run(task);
}
}  // namespace

void recurrent_bwd_scratch(const RecurrentBwdArgs& p, int64_t longest, int64_t* bytes) {
  Arena arena{nullptr};
  if (p.x.in.q.dtype == DType::f64)
    Worker<double>(arena, p, longest);
  else
    Worker<float>(arena, p, longest);
  *bytes = arena.used;
}

void recurrent_bwd(const RecurrentBwdArgs& p, int64_t longest, const ChunkTask& task,
                   void* scratch) {
  p.x.in.q.dtype == DType::f64 ? run<double>(p, longest, task, scratch)
                               : run<float>(p, longest, task, scratch);
}
}  // namespace df::cpu::DF_ISA
