// What the forward and the backward of a chunk share: panels of q^, k^, v in the compute type, and
// the per-token tables of one value head. Included by kernel files only (per instruction set).
// A panel row has whole vectors; padding columns hold zeros, rows beyond the chunk anything finite.
#pragma once
#include "common/cpu/gemm.h"
#include "common/cpu/math.h"
#include "common/cpu/stream.h"
#include "gated_delta/panels.h"

namespace df::cpu::DF_ISA {
namespace {
// q^, k^ and their products, shared by the value heads of a group.
template <class T>
struct KeyPanels {
  T *q, *k, *kT, *qk, *kk, *rq, *rk;
  int64_t ldk, ldc;
  KeyPanels(Arena& arena, const ChunkShape& s) : ldk(round_up<T>(s.K)), ldc(round_up<T>(s.C)) {
    q = arena.take<T>(ldc * ldk), k = arena.take<T>(ldc * ldk), kT = arena.take<T>(ldk * ldc);
    qk = arena.take<T>(s.C * ldc), kk = arena.take<T>(s.C * ldc);
    rq = arena.take<T>(s.C), rk = arena.take<T>(s.C);
  }
  void load(const ChunkInputs& in, int64_t batch, int64_t begin, int64_t head, int64_t rows,
            bool with_q, int64_t ahead) {
    load_panel(in.k, batch, begin, head, rows, in.shape.K, 0, k, ldk, ahead);
    if (in.l2norm) normalize(k, ldk, rows, rk);
    transpose(k, ldk, rows, ldk, kT, ldc);
    gemm_lower(rows, in.shape.K, plain(k, ldk), kT, ldc, kk, ldc);
    if (!with_q) return;
    load_panel(in.q, batch, begin, head, rows, in.shape.K, 0, q, ldk, ahead);
    if (in.l2norm) normalize(q, ldk, rows, rq);
    gemm_lower(rows, in.shape.K, plain(q, ldk), kT, ldc, qk, ldc);
  }
};

// Per-token tables of one value head: g, beta, gam_i = e^{G_i}, del_i = e^{G_C - G_i} and the
// decay matrix Gam_ij = e^{G_i - G_j}, i >= j. G is summed in double; exponents are never positive
// for g <= 0, and what would be a subnormal factor is 0.
template <class T>
struct Tables {
  T *beta, *gam, *del, *decay;
  double *raw, *g, *G;  // g before and after the fused gate, not clamped; its running sum
  T chunk_decay;
  int64_t ldc;
  Tables(Arena& arena, const ChunkShape& s) : ldc(round_up<T>(s.C)) {
    beta = arena.take<T>(ldc), gam = arena.take<T>(ldc), del = arena.take<T>(ldc);
    decay = arena.take<T>(s.C * ldc);
    raw = arena.take<double>(s.C), g = arena.take<double>(s.C), G = arena.take<double>(s.C);
  }
  void load(const ChunkInputs& in, int64_t batch, int64_t begin, int64_t head, int64_t rows) {
    const PreActivation& pre = in.pre;
    const Gate gate_of_head = head_gate(pre, head);
    double sum = 0;
    for (int64_t i = 0; i < rows; ++i) {
      raw[i] = scalar(in.g, batch, begin + i, head);
      g[i] = pre.A_log.data ? gate(gate_of_head, raw[i]) : raw[i];
      G[i] = sum += clamp_gate(g[i]);
      const double b = scalar(in.beta, batch, begin + i, head);
      beta[i] = T(pre.sigmoid_scale > 0 ? sigmoid_beta(b, pre.sigmoid_scale) : b);
    }
    const double last = G[rows - 1];
    for (int64_t i = 0; i < rows; ++i) gam[i] = T(G[i]), del[i] = T(last - G[i]);
    decays(gam, rows), decays(del, rows);
    chunk_decay = gam[rows - 1];
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j <= i; ++j) decay[i * ldc + j] = T(G[i] - G[j]);
      decays(decay + i * ldc, i + 1);
    }
  }

 private:
  static void decays(T* x, int64_t n) {  // x = e^x; the last vector's tail becomes 0
    constexpr T kLow = sizeof(T) == 4 ? T(-87) : T(-708);
    for (int64_t i = n; i < round_up<T>(n); ++i) x[i] = 2 * kLow;
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> v = DF_ISA::load(x + i);
      store(x + i, v < kLow ? Vec<T>{} : exp<T>(v));
    }
  }
};

// out_ij = decay_ij x_ij factor_j for j <= i (j < i if strict), else 0. Selected, not multiplied by
// zero: what stands right of the diagonal may be NaN of a later token.
template <bool strict, class T>
void lower_product(const T* decay, const T* x, const T* factor, T scale, int64_t rows, int64_t ld,
                   T* out) {
  using I = typename Bits<T>::I;
  Vec<I> lane;
  for (int l = 0; l < kLanes<T>; ++l) lane[l] = l;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < ld; j += kLanes<T>) {
      Vec<T> y{};
      if (j <= i) {
        y = load(decay + i * ld + j) * load(x + i * ld + j) * scale;
        if (factor) y *= load(factor + j);
        y = lane <= I(i - j - strict) ? y : Vec<T>{};
      }
      store(out + i * ld + j, y);
    }
}

// T' = (I + L diag(beta))^-1 by forward substitution: row i is e_i - sum_j L_ij beta_j T'_j. Rows
// whose nonzeros fill kVectors vectors are done together, their sums in registers.
template <class T, int kVectors = 1>
void invert(const T* L, const T* beta, int64_t rows, int64_t ld, T* inverse) {
  constexpr int64_t first = (kVectors - 1) * kLanes<T>, last = kVectors * kLanes<T>;
  for (int64_t i = first; i < last && i < rows; ++i) {
    Vec<T> sums[kVectors] = {};
    for (int64_t j = 0; j < i; ++j) {
      const Vec<T> x = splat(-L[i * ld + j] * beta[j]);
#pragma GCC unroll 32
      for (int w = 0; w < kVectors; ++w) sums[w] += x * load(inverse + j * ld + w * kLanes<T>);
    }
    T* row = inverse + i * ld;
#pragma GCC unroll 32
    for (int w = 0; w < kVectors; ++w) store(row + w * kLanes<T>, sums[w]);
    for (int64_t j = last; j < ld; ++j) row[j] = 0;
    row[i] = 1;
  }
  if constexpr (last < 64)
    if (last < rows) invert<T, kVectors + 1>(L, beta, rows, ld, inverse);
}

// E = T' (V - gam o K S) of one chunk; ks and w are scratch.
template <class T>
void errors(const ChunkInputs& in, const KeyPanels<T>& keys, const Tables<T>& t, const T* inverse,
            const T* v, const T* S, int64_t rows, int64_t ldv, T* ks, T* w, T* e) {
  gemm(rows, ldv, in.shape.K, plain(keys.k, keys.ldk), S, ldv, ks, ldv);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < ldv; c += kLanes<T>)
      store(w + i * ldv + c, load(v + i * ldv + c) - t.gam[i] * load(ks + i * ldv + c));
  gemm<Into::set, Shape::lower>(rows, ldv, rows, plain(inverse, keys.ldc), w, ldv, e, ldv);
}

// S^T, E and T' to a slot for the backward: the columns of V from v0 on, T' with the first of them.
// By streaming stores if the backward is another call: nothing of it stays in the cache till then.
template <bool streaming, class T>
void save_chunk(const KeyPanels<T>& keys, const ChunkShape& s, const T* S, const T* e, int64_t ldv,
                const T* inverse, int64_t v0, int64_t rows, T* slot) {
  const SavedLayout to(s);
  const auto put = [](T* p, Vec<T> v) { streaming ? stream(p, v) : store(p, v); };
  const auto copy = [&](const T* from, int64_t ld_from, T* rows_of, int64_t ld_to) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < ld_from; c += kLanes<T>)
        put(rows_of + i * ld_to + c, load(from + i * ld_from + c));
  };
  transpose(S, ldv, s.K, ldv, slot + v0 * to.K, to.K, put);
  copy(e, ldv, slot + to.e() + v0, to.V);
  if (v0 == 0) copy(inverse, keys.ldc, slot + to.inverse(), to.C);
}

// to_i = factor_i x_i, by rows.
template <class T>
void scale_rows(const T* x, int64_t ldx, const T* factor, T scale, int64_t rows, int64_t ld,
                T* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < ld; c += kLanes<T>)
      store(to + i * ld + c, load(x + i * ldx + c) * (factor[i] * scale));
}
template <class T>
void scale_rows(const T* x, const T* factor, T scale, int64_t rows, int64_t ld, T* to) {
  scale_rows(x, ld, factor, scale, rows, ld, to);
}

// S <- e^{G_C} S + K^T (del o U); du is scratch for del o U.
template <class T>
void advance(const ChunkInputs& in, const KeyPanels<T>& keys, const Tables<T>& t, const T* u,
             int64_t rows, int64_t ldv, T* du, T* S) {
  scale_rows(u, t.del, T(1), rows, ldv, du);
  gemm<Into::add>(in.shape.K, ldv, rows, transposed(keys.k, keys.ldk), du, ldv, S, ldv,
                  t.chunk_decay);
}
}  // namespace
}  // namespace df::cpu::DF_ISA
