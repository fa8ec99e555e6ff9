// One token of one value head: its rows in the compute type, and the step
//   S~ = D S;  e = v - S~^T k;  u = beta e;  S' = S~ + k u^T;  o = S'^T q
// in two passes over S [K][ld], vectorised over columns: the first only reads. D is e^g, or a
// factor a column and a factor a row where gv and gk are given. Kernel files only.
#pragma once
#include "common/cpu/math.h"
#include "gated_delta/panels.h"
#include "gated_delta/recurrent.h"

namespace df::cpu::DF_ISA {
namespace {
// Vectors of columns a pass keeps in registers, in 32 of them or in 16.
constexpr int kStepCols = kVecBytes == 64 ? 4 : 2;

// Rows of ld columns, padded with zeros; q, k and rows have ldk elements.
template <class T>
struct Token {
  T *q, *k, *rows;      // rows: the decay a row, used if gk is given
  T *v, *decay, *beta;  // decay a column
  T *e, *u, *o;
  double raw, g;  // of the scalar gate: as given, and before clamping
  Token(Arena& a, int64_t ldk, int64_t ld) {
    q = a.take<T>(ldk), k = a.take<T>(ldk), rows = a.take<T>(ldk);
    v = a.take<T>(ld), decay = a.take<T>(ld), beta = a.take<T>(ld);
    e = a.take<T>(ld), u = a.take<T>(ld), o = a.take<T>(ld);
  }
};

template <class T>
inline void fill_row(T* row, T x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store(row + i, splat(x));
}

// row = max(row, -88), then e^row times a factor; NaN stays.
template <class T>
inline void decay_row(T* row, T factor, int64_t n) {
  const Vec<T> low = splat(T(kMinGate));
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> g = load(row + i);
    store(row + i, exp<T>(g < low ? low : g) * factor);
  }
}

// A row of q or k, normalised if asked; the factor of the normalisation.
template <class T>
inline T load_key(const ChunkInputs& in, const Input& x, int64_t batch, int64_t token, int64_t head,
                  T* to) {
  const int64_t ldk = round_up<T>(in.shape.K);
  T r = 1;
  load_panel(x, batch, token, head, 1, in.shape.K, 0, to, ldk);
  if (in.l2norm) normalize(to, ldk, 1, &r);
  return r;
}

// v, beta and the decays of columns [v0, v0 + n).
template <class T>
void load_value(const RecurrentInputs& x, Gate head_gate, int64_t batch, int64_t token,
                int64_t head, int64_t v0, int64_t n, Token<T>& to) {
  const ChunkInputs& in = x.in;
  const int64_t ld = round_up<T>(n);
  load_panel(in.v, batch, token, head, 1, n, v0, to.v, ld);
  double decay = 1;
  if (in.g.data) {
    to.raw = scalar(in.g, batch, token, head);
    to.g = in.pre.A_log.data ? gate(head_gate, to.raw) : to.raw;
    decay = __builtin_exp(clamp_gate(to.g));
  }
  if (x.gv.data) {
    load_panel(x.gv, batch, token, head, 1, n, v0, to.decay, ld);
    decay_row(to.decay, T(decay), ld);
  } else {
    fill_row(to.decay, T(decay), ld);
  }
  if (x.gk.data) {
    load_panel(x.gk, batch, token, head, 1, in.shape.K, 0, to.rows, 0);
    decay_row(to.rows, T(1), round_up<T>(in.shape.K));
  }
  const double m = in.pre.sigmoid_scale;
  if (!in.beta.data) {
    fill_row(to.beta, T(1), ld);
  } else if (!x.beta_per_channel) {
    const double b = scalar(in.beta, batch, token, head);
    fill_row(to.beta, T(m > 0 ? sigmoid_beta(b, m) : b), ld);
  } else {
    load_panel(in.beta, batch, token, head, 1, n, v0, to.beta, ld);
    for (int64_t i = 0; m > 0 && i < ld; i += kLanes<T>)
      store(to.beta + i, sigmoid<T>(load(to.beta + i)) * T(m));
  }
}

// from and to may be the same state.
template <class T, int kCols, bool kRows>
inline void step_columns(const Token<T>& x, int64_t K, int64_t ld, int64_t column, const T* from,
                         T* to) {
  constexpr int L = kLanes<T>;
  from += column, to += column;
  // two sums a column, over even and odd rows, hide the latency of the additions
  Vec<T> read[2][kCols] = {};
  for (int64_t i = 0; i < K; ++i) {
    const Vec<T> k = splat(kRows ? x.k[i] * x.rows[i] : x.k[i]);
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) read[0][j] += k * load(from + i * ld + j * L);
    if (++i == K) break;
    const Vec<T> odd = splat(kRows ? x.k[i] * x.rows[i] : x.k[i]);
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) read[1][j] += odd * load(from + i * ld + j * L);
  }
  Vec<T> u[kCols], decay[kCols], o[kCols] = {};
#pragma GCC unroll 4
  for (int j = 0; j < kCols; ++j) {
    const int64_t c = column + j * L;
    decay[j] = load(x.decay + c);
    const Vec<T> e = load(x.v + c) - decay[j] * (read[0][j] + read[1][j]);
    u[j] = load(x.beta + c) * e;
    store(x.e + c, e), store(x.u + c, u[j]);
  }
  for (int64_t i = 0; i < K; ++i) {
    const Vec<T> k = splat(x.k[i]), q = splat(x.q[i]);
#pragma GCC unroll 4
    for (int j = 0; j < kCols; ++j) {
      Vec<T> s = load(from + i * ld + j * L) * decay[j];
      if (kRows) s *= x.rows[i];
      s += k * u[j];
      store(to + i * ld + j * L, s);
      o[j] += q * s;
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < kCols; ++j) store(x.o + column + j * L, o[j]);
}

template <class T, bool kRows>
inline void step(const Token<T>& x, int64_t K, int64_t ld, const T* from, T* to) {
  int64_t c = 0;
  for (; c + kStepCols * kLanes<T> <= ld; c += kStepCols * kLanes<T>)
    step_columns<T, kStepCols, kRows>(x, K, ld, c, from, to);
  for (; c < ld; c += kLanes<T>) step_columns<T, 1, kRows>(x, K, ld, c, from, to);
}
}  // namespace
}  // namespace df::cpu::DF_ISA
