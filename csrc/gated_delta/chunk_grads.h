// Gradients of one chunk of one value head, and of the q/k head that its group shares.
#pragma once
#include "gated_delta/chunk_tables.h"

namespace df::cpu::DF_ISA {
namespace {
// One chunk of one value head, in `SavedLayout`.
template <class T>
struct Saved {
  const T *S_T, *e;
  int64_t ldk, ldv;
  Saved(const SavedLayout& layout, const T* at)
      : S_T(at), e(at + layout.e()), ldk(layout.K), ldv(layout.V) {}
};

// Pairs of panels that are one operand of a product lie one behind the other, at the chunk's number
// of rows: sc gam o dO and -gam o dW in w, X and Y in x, dP and sym in dP; in KeyPanels q^ and k^.
template <class T>
struct GradPanels {
  Tables<T> t;
  int64_t ldk, ldv, ldc;
  T *states, *dstates, *v, *w, *du, *dw, *dO, *eT, *dS_T;  // value side
  T *dq, *dk, *x, *kd;                                     // key side
  T *L, *P, *M, *dP, *dKK, *Z;                             // C x C
  T *rho, *kap, *dbeta, *columns;
  double* sums;  // a head: sum dg g, sum da
  GradPanels(Arena& a, const ChunkShape& s)
      : t(a, s),
        ldk(round_up<T>(s.K)),
        ldv(round_up<T>(s.V)),
        ldc(round_up<T>(steps(s.C) * kStep)) {
    const int64_t value = ldc * ldv, key = ldc * ldk, square = ldc * ldc;
    states = a.take<T>(s.group() * ldk * ldv), dstates = a.take<T>(s.group() * ldk * ldv);
    v = a.take<T>(value), w = a.take<T>(2 * value), du = a.take<T>(value), dw = a.take<T>(value);
    dO = a.take<T>(value), eT = a.take<T>(value), dS_T = a.take<T>(ldk * ldv);
    dq = a.take<T>(key), dk = a.take<T>(key), x = a.take<T>(2 * key), kd = a.take<T>(key);
    L = a.take<T>(square), P = a.take<T>(square), M = a.take<T>(square);
    dP = a.take<T>(2 * square), dKK = a.take<T>(square), Z = a.take<T>(square);
    rho = a.take<T>(ldc), kap = a.take<T>(ldc), dbeta = a.take<T>(ldc), columns = a.take<T>(ldc);
    sums = a.take<double>(2 * s.group());
  }
};

template <class T>
inline void add_rows(const T* x, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store(to + i, load(to + i) + load(x + i));
}

// x_i = beta_i (z_i - sum_{j>i} L_ji x_j) for kStep rows of one vector of columns, in place.
template <class T>
[[gnu::noinline]] void solve_back(const T* beta, const T* minus_L, int64_t ldc, T* z, int64_t ld) {
  constexpr int kRows = int(kStep);
  Vec<T> x[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) x[i] = load(z + i * ld);
#pragma GCC unroll 16
  for (int j = kRows - 1; j >= 0; --j) {
    x[j] *= beta[j];
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      if (i < j) x[i] += minus_L[j * ldc + i] * x[j];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) store(z + i * ld, x[i]);
}

// (I + diag(beta) L^T) dW = beta o dU by back substitution, a step of rows at a time; dW holds dU.
// Rows between the chunk's last and the end of its step are zeroed: they come first here.
template <class T>
void substitute_back(GradPanels<T>& b, int64_t n) {
  const int64_t ldv = b.ldv, ldc = b.ldc, padded = steps(n) * kStep;
  __builtin_memset(b.dw + n * ldv, 0, (padded - n) * ldv * sizeof(T));
  __builtin_memset(b.L + n * ldc, 0, (padded - n) * ldc * sizeof(T));
  for (int64_t i = padded - kStep; i >= 0; i -= kStep) {
    T *rows = b.dw + i * ldv, *below = b.L + (i + kStep) * ldc + i;
    if (i + kStep < n)
      gemm<Into::add>(kStep, ldv, n - i - kStep, transposed(below, ldc), rows + kStep * ldv, ldv,
                      rows, ldv);
    for (int64_t c = 0; c < ldv; c += kLanes<T>)
      solve_back(b.t.beta + i, b.L + i * ldc + i, ldc, rows + c, ldv);
  }
}

// dU = sc P^T dO + del o (K dS) into b.du, dW into b.dw; sc gam o dO and -gam o dW into b.w.
template <class T>
void value_gradients(const ChunkInputs& in, const KeyPanels<T>& keys, GradPanels<T>& b, const T* dS,
                     int64_t n, Ahead& ahead) {
  const int64_t ldv = b.ldv, ldc = b.ldc;
  gemm(n, ldv, in.shape.K, plain(keys.k, b.ldk), dS, ldv, b.du, ldv, 1,
       [&]() __attribute__((always_inline)) { ahead.some(); });
  scale_rows(b.du, b.t.del, T(1), n, ldv, b.du);
  lower_product<false, T>(b.t.decay, keys.qk, nullptr, T(in.scale), n, ldc, b.P);
  gemm<Into::add, Shape::upper>(n, ldv, n, transposed(b.P, ldc), b.dO, ldv, b.du, ldv);
  lower_product<true, T>(b.t.decay, keys.kk, nullptr, T(-1), n, ldc, b.L);
  __builtin_memcpy(b.dw, b.du, n * ldv * sizeof(T));
  substitute_back(b, n);
  scale_rows(b.dO, b.t.gam, T(in.scale), n, ldv, b.w);
  scale_rows(b.dw, b.t.gam, T(-1), n, ldv, b.w + n * ldv);
}

// sym = dKK + dKK^T, n rows, behind those of dP.
template <class T>
void symmetrize(GradPanels<T>& b, int64_t n) {
  const int64_t ldc = b.ldc;
  T* sym = b.dP + n * ldc;
  transpose(b.dKK, ldc, n, n, sym, ldc);
  for (int64_t i = 0; i < n; ++i) add_rows(b.dKK + i * ldc, i + 1, sym + i * ldc);
}

// The C x C gradients: M = dW E^T, dP = sc Gam o (dO U^T), dKK = -Gam o strictlower(M) diag(beta),
// Z = strictlower(dP o QK^T + dKK o KK^T), and dbeta_i = E_i . dU_i - sum_{j>i} L_ji M_ji.
template <class T>
void square_gradients(const ChunkInputs& in, const KeyPanels<T>& keys, GradPanels<T>& b,
                      const Saved<T>& kept, int64_t n) {
  const int64_t V = in.shape.V, ldv = b.ldv, ldc = b.ldc;
  transpose(kept.e, kept.ldv, n, ldv, b.eT, ldc);
  gemm_lower(n, V, plain(b.dw, ldv), b.eT, ldc, b.M, ldc);
  gemm_lower(n, V, plain(b.dO, ldv), b.eT, ldc, b.Z, ldc);
  lower_product<false, T>(b.t.decay, b.Z, b.t.beta, T(in.scale), n, ldc, b.dP);
  lower_product<true, T>(b.t.decay, b.M, b.t.beta, T(-1), n, ldc, b.dKK);
  symmetrize(b, n);
  lower_product<true, T>(b.L, b.M, nullptr, T(1), n, ldc, b.L);
  __builtin_memset(b.columns, 0, ldc * sizeof(T));
  for (int64_t i = 0; i < n; ++i) {
    b.dbeta[i] = dot_row(kept.e + i * kept.ldv, b.du + i * ldv, ldv);
    add_rows(b.L + i * ldc, i + 1, b.columns);
  }
  for (int64_t i = 0; i < n; ++i) b.dbeta[i] += b.columns[i];
  lower_product<true, T>(b.dP, keys.qk, nullptr, T(1), n, ldc, b.Z);
  lower_product<true, T>(b.dKK, keys.kk, nullptr, T(1), n, ldc, b.L);
  for (int64_t i = 0; i < n; ++i) add_rows(b.L + i * ldc, i + 1, b.Z + i * ldc);
}

// dQ = X + dP K, dK = Kd + Y + dP^T Q + (dKK + dKK^T) K, of a group's first head or added to those
// of the heads before, with X = (sc gam o dO) S^T, Kd = (del o U) dS^T, Y = -(gam o dW) S^T;
// kap = k . kd and rho = q . x + k . y for dg. Leaves dS^T in b.dS_T.
template <class T>
void add_key_gradients(const ChunkInputs& in, const KeyPanels<T>& keys, GradPanels<T>& b,
                       const Saved<T>& kept, const T* dS, int64_t n, bool first, Ahead& ahead) {
  const int64_t K = in.shape.K, V = in.shape.V, ldk = b.ldk, ldv = b.ldv, ldc = b.ldc;
  const auto prefetch = [&]() __attribute__((always_inline)) { ahead.some(); };
  transpose(dS, ldv, K, ldv, b.dS_T, ldk);
  for (int64_t i = 0; i < n; ++i) b.columns[i] = b.t.del[i] * b.t.beta[i];
  scale_rows(kept.e, kept.ldv, b.columns, T(1), n, ldv, b.v);
  gemm(n, ldk, V, plain(b.v, ldv), b.dS_T, ldk, b.kd, ldk, 1, prefetch);
  gemm(2 * n, ldk, V, plain(b.w, ldv), kept.S_T, kept.ldk, b.x, ldk, 1, prefetch);
  for (int64_t i = 0; i < n; ++i) {
    const T *q = keys.q + i * ldk, *k = keys.k + i * ldk, *kd = b.kd + i * ldk;
    const T *x = b.x + i * ldk, *y = x + n * ldk;
    T *dq = b.dq + i * ldk, *dk = b.dk + i * ldk;
    Vec<T> kap{}, of_q{}, of_k{};
    for (int64_t c = 0; c < ldk; c += kLanes<T>) {
      const Vec<T> from_x = load(x + c), from_y = load(y + c), from_kd = load(kd + c);
      const Vec<T> key = load(k + c), to_k = from_y + from_kd;
      of_q += load(q + c) * from_x, of_k += key * from_y, kap += key * from_kd;
      store(dq + c, first ? from_x : load(dq + c) + from_x);
      store(dk + c, first ? to_k : load(dk + c) + to_k);
    }
    b.kap[i] = sum<T>(kap), b.rho[i] = sum<T>(of_q + of_k);
  }
  gemm<Into::add, Shape::lower>(n, ldk, n, plain(b.dP, ldc), keys.k, ldk, b.dq, ldk, 1, prefetch);
  gemm<Into::add, Shape::upper>(n, ldk, 2 * n, transposed(b.dP, ldc), keys.q, ldk, b.dk, ldk, 1,
                                prefetch);
}

template <class T>
inline double sum_row(const T* x, int64_t n) {
  Vec<T> lanes{};
  double tail = 0;
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) lanes += load(x + i);
  for (; i < n; ++i) tail += x[i];
  return sum<T>(lanes) + tail;
}

// dg_t = e^{G_C} <dS, S> + sum_{j<t} kap_j + sum_{i>=t} rho_i + sum_{i>=t>j} Z_ij: sums only, so
// that a strong decay cancels nothing. Written to the places of g and beta in [B,T,HV].
template <class T>
void scalar_gradients(const ChunkBwdArgs& p, GradPanels<T>& b, T inner, int64_t n, int64_t head,
                      T* dg, T* dbeta, double* sums) {
  const ChunkInputs& in = p.in;
  const Gate gate_of_head = head_gate(in.pre, head);
  const double m = in.pre.sigmoid_scale;
  const int64_t ldc = b.ldc;
  __builtin_memcpy(b.columns, b.kap, n * sizeof(T));  // kap_j + sum_{i>=t} Z_ij
  double rho_after = 0;
  for (int64_t t = n - 1; t >= 0; --t) {
    add_rows(b.Z + t * ldc, round_up<T>(t + 1), b.columns);
    rho_after += b.rho[t];
    const double d = double(inner) + rho_after + sum_row(b.columns, t);
    double dgate = clamp_gate_bwd(b.t.g[t], d), dlogit = b.dbeta[t];
    if (in.pre.A_log.data) {
      sums[0] += dgate * clamp_gate(b.t.g[t]);
      dgate *= gate_slope(gate_of_head, b.t.raw[t]);
      sums[1] += dgate;
    }
    if (m > 0) dlogit = sigmoid_beta_bwd(b.t.beta[t], m, dlogit);
    dg[t * in.shape.HV] = T(dgate), dbeta[t * in.shape.HV] = T(dlogit);
  }
}

// dS: gradient of the state that leaves; becomes that of the state that entered.
template <class T>
void head_gradients(const ChunkBwdArgs& p, const KeyPanels<T>& keys, GradPanels<T>& b,
                    const Saved<T>& kept, T* dS, int64_t batch, int64_t begin, int64_t head,
                    int64_t n, double* sums, Ahead& ahead) {
  const ChunkInputs& in = p.in;
  const ChunkShape& s = in.shape;
  b.t.load(in, batch, begin, head, n);
  load_panel(p.d_o, batch, begin, head, n, s.V, 0, b.dO, b.ldv);
  value_gradients(in, keys, b, dS, n, ahead);
  square_gradients(in, keys, b, kept, n);
  add_key_gradients(in, keys, b, kept, dS, n, head % s.group() == 0, ahead);

  const int64_t token = batch * s.T + begin, at = token * s.HV + head;
  T inner = 0;  // <dS, S>
  for (int64_t v = 0; v < s.V; ++v)
    inner += dot_row(b.dS_T + v * b.ldk, kept.S_T + v * kept.ldk, b.ldk);
  scalar_gradients(p, b, b.t.chunk_decay * inner, n, head, static_cast<T*>(p.dg) + at,
                   static_cast<T*>(p.dbeta) + at, sums);
  store_rows(b.dw, b.ldv, n, s.V, in.q.dtype, p.dv, at * s.V, s.HV * s.V, p.streaming_values);
  gemm<Into::add>(s.K, b.ldv, 2 * n, transposed(keys.q, b.ldk), b.w, b.ldv, dS, b.ldv,
                  b.t.chunk_decay, [&]() __attribute__((always_inline)) { ahead.some(); });
}

template <class T>
void key_gradients(const ChunkBwdArgs& p, const KeyPanels<T>& keys, GradPanels<T>& b, int64_t batch,
                   int64_t begin, int64_t key_head, int64_t n) {
  const ChunkShape& s = p.in.shape;
  for (int64_t i = 0; p.in.l2norm && i < n; ++i) {
    l2norm_bwd(keys.q + i * b.ldk, keys.rq[i], b.dq + i * b.ldk, b.ldk);
    l2norm_bwd(keys.k + i * b.ldk, keys.rk[i], b.dk + i * b.ldk, b.ldk);
  }
  const int64_t first = ((batch * s.T + begin) * s.H + key_head) * s.K, stride = s.H * s.K;
  store_rows(b.dq, b.ldk, n, s.K, p.in.q.dtype, p.dq, first, stride, p.streaming_keys);
  store_rows(b.dk, b.ldk, n, s.K, p.in.q.dtype, p.dk, first, stride, p.streaming_keys);
}
}  // namespace
}  // namespace df::cpu::DF_ISA
