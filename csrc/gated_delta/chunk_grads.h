// Gradients of one chunk of one value head, and of the q/k head that its group shares.
#pragma once
#include "gated_delta/chunk_tables.h"

namespace df::cpu::DF_ISA {
namespace {
// One chunk of one value head, in `SavedLayout`.
template <class T>
struct Saved {
  const T *S_T, *e, *inverse;
  int64_t ldk, ldv, ldc;
  Saved(const SavedLayout& layout, const T* at)
      : S_T(at),
        e(at + layout.e()),
        inverse(at + layout.inverse()),
        ldk(layout.K),
        ldv(layout.V),
        ldc(layout.C) {}
};

template <class T>
struct GradPanels {
  Tables<T> t;
  int64_t ldk, ldv, ldc;
  T *states, *dstates, *v, *w, *du, *dw, *dO, *eT, *dS_T;  // value side
  T *dq, *dk, *x, *y, *kd;                                 // key side
  T *L, *P, *M, *dP, *dKK, *Z;                             // C x C
  T *rho, *kap, *dbeta, *columns;
  double* sums;  // a head: sum dg g, sum da
  GradPanels(Arena& a, const ChunkShape& s)
      : t(a, s), ldk(round_up<T>(s.K)), ldv(round_up<T>(s.V)), ldc(round_up<T>(s.C)) {
    const int64_t value = ldc * ldv, key = ldc * ldk, square = ldc * ldc;
    states = a.take<T>(s.group() * ldk * ldv), dstates = a.take<T>(s.group() * ldk * ldv);
    v = a.take<T>(value), w = a.take<T>(value), du = a.take<T>(value), dw = a.take<T>(value);
    dO = a.take<T>(value), eT = a.take<T>(value), dS_T = a.take<T>(ldk * ldv);
    dq = a.take<T>(key), dk = a.take<T>(key), x = a.take<T>(key);
    y = a.take<T>(key), kd = a.take<T>(key);
    L = a.take<T>(square), P = a.take<T>(square), M = a.take<T>(square);
    dP = a.take<T>(square), dKK = a.take<T>(square), Z = a.take<T>(square);
    rho = a.take<T>(ldc), kap = a.take<T>(ldc), dbeta = a.take<T>(ldc), columns = a.take<T>(ldc);
    sums = a.take<double>(2 * s.group());
  }
};

template <class T>
inline void add_rows(const T* x, int64_t n, T* to) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store(to + i, load(to + i) + load(x + i));
}

// dU = sc P^T dO + del o (K dS) into b.du, dW = T'^T (beta o dU) into b.dw.
template <class T>
void value_gradients(const ChunkInputs& in, const KeyPanels<T>& keys, GradPanels<T>& b,
                     const Saved<T>& kept, const T* dS, int64_t n) {
  const int64_t ldv = b.ldv, ldc = b.ldc;
  gemm(n, ldv, in.shape.K, plain(keys.k, b.ldk), dS, ldv, b.du, ldv);
  scale_rows(b.du, b.t.del, T(1), n, ldv, b.du);
  lower_product<false, T>(b.t.decay, keys.qk, nullptr, T(in.scale), n, ldc, b.P);
  gemm<Into::add, Shape::upper>(n, ldv, n, transposed(b.P, ldc), b.dO, ldv, b.du, ldv);
  scale_rows(b.du, b.t.beta, T(1), n, ldv, b.w);
  gemm<Into::set, Shape::upper>(n, ldv, n, transposed(kept.inverse, kept.ldc), b.w, ldv, b.dw, ldv);
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
  lower_product<true, T>(b.t.decay, keys.kk, nullptr, T(1), n, ldc, b.L);
  lower_product<true, T>(b.L, b.M, nullptr, T(1), n, ldc, b.L);
  __builtin_memset(b.columns, 0, ldc * sizeof(T));
  for (int64_t i = 0; i < n; ++i) {
    b.dbeta[i] = dot_row(kept.e + i * kept.ldv, b.du + i * ldv, ldv);
    for (int64_t j = 0; j <= i; j += kLanes<T>) {
      store(b.columns + j, load(b.columns + j) + load(b.L + i * ldc + j));
    }
  }
  for (int64_t i = 0; i < n; ++i) b.dbeta[i] -= b.columns[i];
  lower_product<true, T>(b.dP, keys.qk, nullptr, T(1), n, ldc, b.Z);
  lower_product<true, T>(b.dKK, keys.kk, nullptr, T(1), n, ldc, b.L);
  for (int64_t i = 0; i < n; ++i) add_rows(b.L + i * ldc, round_up<T>(i + 1), b.Z + i * ldc);
}

// dQ += X + dP K, dK += Kd + Y + dP^T Q + (dKK + dKK^T) K with X = sc gam o (dO S^T),
// Kd = del o (U dS^T), Y = -(gam o dW) S^T; kap = k . kd and rho = q . x + k . y for dg.
// Leaves -gam o dW in b.w and dS^T in b.dS_T.
template <class T>
void add_key_gradients(const ChunkInputs& in, const KeyPanels<T>& keys, GradPanels<T>& b,
                       const Saved<T>& kept, const T* dS, int64_t n) {
  const int64_t K = in.shape.K, V = in.shape.V, ldk = b.ldk, ldv = b.ldv, ldc = b.ldc;
  transpose(dS, ldv, K, ldv, b.dS_T, ldk);
  scale_rows(kept.e, kept.ldv, b.t.beta, T(1), n, ldv, b.w);
  gemm(n, ldk, V, plain(b.w, ldv), b.dS_T, ldk, b.kd, ldk);
  scale_rows(b.kd, b.t.del, T(1), n, ldk, b.kd);
  gemm(n, ldk, V, plain(b.dO, ldv), kept.S_T, kept.ldk, b.x, ldk);
  scale_rows(b.x, b.t.gam, T(in.scale), n, ldk, b.x);
  scale_rows(b.dw, b.t.gam, T(-1), n, ldv, b.w);
  gemm(n, ldk, V, plain(b.w, ldv), kept.S_T, kept.ldk, b.y, ldk);
  for (int64_t i = 0; i < n; ++i) {
    const T *q = keys.q + i * ldk, *k = keys.k + i * ldk;
    T *x = b.x + i * ldk, *y = b.y + i * ldk, *kd = b.kd + i * ldk;
    b.kap[i] = dot_row(k, kd, ldk);
    b.rho[i] = dot_row(q, x, ldk) + dot_row(k, y, ldk);
    add_rows(x, ldk, b.dq + i * ldk);
    add_rows(y, ldk, b.dk + i * ldk), add_rows(kd, ldk, b.dk + i * ldk);
  }
  gemm<Into::add, Shape::lower>(n, ldk, n, plain(b.dP, ldc), keys.k, ldk, b.dq, ldk);
  gemm<Into::add, Shape::upper>(n, ldk, n, transposed(b.dP, ldc), keys.q, ldk, b.dk, ldk);
  gemm<Into::add, Shape::lower>(n, ldk, n, plain(b.dKK, ldc), keys.k, ldk, b.dk, ldk);
  gemm<Into::add, Shape::upper>(n, ldk, n, transposed(b.dKK, ldc), keys.k, ldk, b.dk, ldk);
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
                    int64_t n, double* sums) {
  const ChunkInputs& in = p.in;
  const ChunkShape& s = in.shape;
  b.t.load(in, batch, begin, head, n);
  load_panel(p.d_o, batch, begin, head, n, s.V, 0, b.dO, b.ldv, -s.C);
  value_gradients(in, keys, b, kept, dS, n);
  square_gradients(in, keys, b, kept, n);
  add_key_gradients(in, keys, b, kept, dS, n);

  const int64_t token = batch * s.T + begin, at = token * s.HV + head;
  T inner = 0;  // <dS, S>
  for (int64_t v = 0; v < s.V; ++v)
    inner += dot_row(b.dS_T + v * b.ldk, kept.S_T + v * kept.ldk, b.ldk);
  scalar_gradients(p, b, b.t.chunk_decay * inner, n, head, static_cast<T*>(p.dg) + at,
                   static_cast<T*>(p.dbeta) + at, sums);
  store_rows(b.dw, b.ldv, n, s.V, in.q.dtype, p.dv, at * s.V, s.HV * s.V, p.streaming_values);

  gemm<Into::add>(s.K, b.ldv, n, transposed(keys.k, b.ldk), b.w, b.ldv, dS, b.ldv, b.t.chunk_decay);
  scale_rows(b.dO, b.t.gam, T(in.scale), n, b.ldv, b.w);
  gemm<Into::add>(s.K, b.ldv, n, transposed(keys.q, b.ldk), b.w, b.ldv, dS, b.ldv);
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
