// Gated delta rule, 1 to 8 tokens on an indexed pool of states, in place:
//   u = beta (v - e^g S k^);  S <- e^g S + u k^T;  o = S q^        (S is V x K in both layouts)
// Task = (row, value head, tile of 64 rows of V): 32 KB of float state at K = 128, read from memory
// once, then from L1. States of the compute type are updated in place, others through scratch.
#include "common/cpu/convert.h"
#include "gated_delta/decode.h"
#include "gated_delta/preact.h"

namespace df::cpu::DF_ISA {
namespace {
template <class T>
struct Token {
  const T *q, *k;
  T decay, beta;
};
template <class T>
struct Matrix {  // rows `ld` apart
  T* data;
  int64_t ld;
};

template <class X, class T>
X load_as(const T* p) {  // X: T or a vector of it
  X x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
template <class X, class T>
void store_as(T* p, X x) {
  __builtin_memcpy(p, &x, sizeof(x));
}

// S[V][K]: kRows rows at once, each a dot product and then an update with the second one.
template <int kRows, class T>
void rows_of_k(const Token<T>& x, Matrix<const T> from, Matrix<T> to, int64_t K, const T* v, T* o) {
  const int64_t whole = K - K % kLanes<T>;
  Vec<T> lanes[kRows] = {};
  T u[kRows] = {};
  for (int64_t i = 0; i < whole; i += kLanes<T>) {
    const Vec<T> k = load(x.k + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) lanes[r] += load(from.data + r * from.ld + i) * k;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int64_t i = whole; i < K; ++i) u[r] += from.data[r * from.ld + i] * x.k[i];
    u[r] = x.beta * (v[r] - x.decay * (sum<T>(lanes[r]) + u[r]));
    lanes[r] = Vec<T>{};
  }
  for (int64_t i = 0; i < whole; i += kLanes<T>) {
    const Vec<T> k = load(x.k + i), q = load(x.q + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec<T> s = x.decay * load(from.data + r * from.ld + i) + u[r] * k;
      store(to.data + r * to.ld + i, s);
      lanes[r] += s * q;
    }
  }
  for (int r = 0; r < kRows; ++r) {
    T tail = 0;
    for (int64_t i = whole; i < K; ++i) {
      const T s = x.decay * from.data[r * from.ld + i] + u[r] * x.k[i];
      to.data[r * to.ld + i] = s;
      tail += s * x.q[i];
    }
    o[r] = sum<T>(lanes[r]) + tail;
  }
}

// S[K][V]: kCols vectors (or single columns) of V at once.
template <class X, int kCols, class T>
void columns_of_v(const Token<T>& x, Matrix<const T> from, Matrix<T> to, int64_t K, const T* v,
                  T* o) {
  constexpr int kStep = sizeof(X) / sizeof(T);
  X u[kCols] = {}, sums[kCols] = {};
  for (int64_t i = 0; i < K; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c)
      u[c] += x.k[i] * load_as<X>(from.data + i * from.ld + c * kStep);
#pragma GCC unroll 4
  for (int c = 0; c < kCols; ++c) u[c] = x.beta * (load_as<X>(v + c * kStep) - x.decay * u[c]);
  for (int64_t i = 0; i < K; ++i)
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) {
      const X s = x.decay * load_as<X>(from.data + i * from.ld + c * kStep) + x.k[i] * u[c];
      store_as(to.data + i * to.ld + c * kStep, s);
      sums[c] += x.q[i] * s;
    }
#pragma GCC unroll 4
  for (int c = 0; c < kCols; ++c) store_as(o + c * kStep, sums[c]);
}

template <class T>
void token(const Token<T>& x, Matrix<const T> from, Matrix<T> to, int64_t K, int64_t V,
           bool v_first, const T* v, T* o) {
  int64_t i = 0;
  const auto row = [](auto m, int64_t n) { return decltype(m){m.data + n * m.ld, m.ld}; };
  const auto column = [](auto m, int64_t n) { return decltype(m){m.data + n, m.ld}; };
  if (v_first) {
    for (; i + 4 <= V; i += 4) rows_of_k<4>(x, row(from, i), row(to, i), K, v + i, o + i);
    for (; i < V; ++i) rows_of_k<1>(x, row(from, i), row(to, i), K, v + i, o + i);
    return;
  }
  for (; i + 4 * kLanes<T> <= V; i += 4 * kLanes<T>)
    columns_of_v<Vec<T>, 4>(x, column(from, i), column(to, i), K, v + i, o + i);
  for (; i + kLanes<T> <= V; i += kLanes<T>)
    columns_of_v<Vec<T>, 1>(x, column(from, i), column(to, i), K, v + i, o + i);
  for (; i < V; ++i) columns_of_v<T, 1>(x, column(from, i), column(to, i), K, v + i, o + i);
}

template <class E>
const E* at(const Input& x, int64_t b, int64_t t, int64_t h) {
  return static_cast<const E*>(x.data) + x.at(b, t, h);
}
double number(const void* p, DType type, int64_t i) {
  double x = 0;
  dispatch(type, [&](auto tag) {
    x = to_compute(static_cast<const typename decltype(tag)::type*>(p)[i]);
  });
  return x;
}
int64_t slot(const void* indices, bool is64, int64_t b) {
  return !indices ? b
         : is64   ? static_cast<const int64_t*>(indices)[b]
                  : static_cast<const int32_t*>(indices)[b];
}

// E: type of q, k, v and the output; S: of the state; T: of the arithmetic.
template <class E, class S, class T>
struct Decode {
  const DecodeArgs& p;
  T *q, *k, *tile, *v, *o;
  Token<T> tokens[8];

  Decode(const DecodeArgs& args, double* scratch) : p(args) {
    q = reinterpret_cast<T*>(scratch);
    k = q + p.T * p.K;
    v = k + p.T * p.K;
    o = v + kDecodeTile;
    tile = o + kDecodeTile;
  }

  void prepare(int64_t b, int64_t h) {  // what all tiles of a row and head share
    const double dt_bias = p.dt_bias.data ? number(p.dt_bias.data, p.dt_bias.dtype, h) : 0;
    const Gate of_head = make_gate(number(p.A_log.data, p.A_log.dtype, h), dt_bias);
    const int64_t hk = h / (p.HV / p.H);
    for (int64_t t = 0; t < p.T; ++t) {
      T *q_t = q + t * p.K, *k_t = k + t * p.K;
      load_row(at<E>(p.q, b, t, hk), q_t, p.K);
      load_row(at<E>(p.k, b, t, hk), k_t, p.K);
      const T of_q = T(p.scale) * (p.l2norm ? inverse_norm(q_t, p.K) : T(1));
      const T of_k = p.l2norm ? inverse_norm(k_t, p.K) : T(1);
      for (int64_t i = 0; i < p.K; ++i) q_t[i] *= of_q, k_t[i] *= of_k;
      const double g = gate(of_head, number(p.a.data, p.a.dtype, p.a.at(b, t, h)));
      const double beta = sigmoid_beta(number(p.b.data, p.b.dtype, p.b.at(b, t, h)), 1);
      tokens[t] = {q_t, k_t, T(__builtin_exp(clamp_gate(g))), T(beta)};
    }
  }

  E* output(int64_t b, int64_t t, int64_t h) const {
    return static_cast<E*>(p.output) + p.o.at(b, t, h);
  }

  // One tile: V rows from v0 on. `inner` is the length of a row of the state in memory.
  void run(int64_t b, int64_t h, int64_t v0, int64_t read, int64_t write) {
    const int64_t V = p.V - v0 < kDecodeTile ? p.V - v0 : kDecodeTile;
    const int64_t inner = p.v_first ? p.K : p.V, rows = p.v_first ? V : p.K;
    const int64_t width = p.v_first ? p.K : V, corner = p.v_first ? v0 * p.K : v0;
    const int64_t head = p.K * p.V;
    S* const pool = static_cast<S*>(p.state) + h * head + corner;
    S* const source = pool + read * p.state_stride;
    S* const target = write < 0 ? nullptr : pool + write * p.state_stride;
    Matrix<T> to{tile, width};
    Matrix<const T> from{tile, width};
    if constexpr (__is_same(S, T)) {
      from = {source, inner};
      if (target) to = {target, inner};
    } else {
      for (int64_t r = 0; r < rows; ++r) load_row(source + r * inner, tile + r * width, width);
    }
    for (int64_t t = 0; t < p.T; ++t) {
      load_row(at<E>(p.v, b, t, h) + v0, v, V);
      token(tokens[t], from, to, p.K, V, p.v_first, v, o);
      from = {to.data, to.ld};
      store_row(o, output(b, t, h) + v0, V);
      if (p.snapshots) {
        S* const shot = static_cast<S*>(p.snapshots) + ((b * p.T + t) * p.HV + h) * head + corner;
        for (int64_t r = 0; r < rows; ++r) store_row(to.data + r * to.ld, shot + r * inner, width);
      }
    }
    if constexpr (!__is_same(S, T))
      for (int64_t r = 0; target && r < rows; ++r)
        store_row(tile + r * width, target + r * inner, width);
  }

  void padding(int64_t b, int64_t h, int64_t v0) {
    for (int64_t t = 0; t < p.T; ++t)
      for (int64_t i = v0; i < p.V && i < v0 + kDecodeTile; ++i)
        from_compute(T(0), output(b, t, h) + i);
  }

  void tasks(int64_t begin, int64_t end) {
    const int64_t tiles = decode_tiles(p);
    int64_t prepared = -1;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t pair = i / tiles, b = pair / p.HV, h = pair % p.HV;
      const int64_t v0 = i % tiles * kDecodeTile, read = slot(p.read, p.read64, b);
      if (read < 0) {
        padding(b, h, v0);
        continue;
      }
      if (pair != prepared) prepare(b, h);
      prepared = pair;
      run(b, h, v0, read, p.write ? slot(p.write, p.write64, b) : read);
    }
  }
};
}  // namespace

void decode(const DecodeArgs& p, double* scratch, int64_t begin, int64_t end) {
  dispatch(p.q.dtype, [&](auto e) {
    using E = typename decltype(e)::type;
    dispatch(p.state_type, [&](auto s) {
      using S = typename decltype(s)::type;
      // double inputs with double states, any other mixture without double
      if constexpr (__is_same(E, double) == __is_same(S, double))
        Decode<E, S, Compute<E>>(p, scratch).tasks(begin, end);
    });
  });
}
}  // namespace df::cpu::DF_ISA
