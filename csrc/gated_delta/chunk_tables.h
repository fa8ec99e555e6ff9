// What the backward of a chunk reads: panels of q^, k^ in the compute type, and the tables per
// token of one value head. Included by kernel files only (per instruction set). A panel row has
// whole vectors; padding columns hold zeros, rows beyond the chunk anything finite.
#pragma once
#include "common/cpu/gemm.h"
#include "common/cpu/math.h"
#include "common/cpu/stream.h"
#include "gated_delta/chunk_steps.h"

namespace df::cpu::DF_ISA {
namespace {
// q^, k^ of a chunk and their products, shared by the value heads of a group. The rows of k^ follow
// those of q^ immediately, so that the two are one operand.
template <class T>
struct KeyPanels {
  T *q, *k, *kT, *qk, *kk, *rq, *rk;
  int64_t ldk, ldc;
  KeyPanels(Arena& arena, const ChunkShape& s)
      : ldk(round_up<T>(s.K)), ldc(round_up<T>(steps(s.C) * kStep)) {
    q = arena.take<T>(2 * ldc * ldk), kT = arena.take<T>(ldk * ldc);
    qk = arena.take<T>(s.C * ldc), kk = arena.take<T>(s.C * ldc);
    rq = arena.take<T>(s.C), rk = arena.take<T>(s.C);
  }
  void load(const ChunkInputs& in, int64_t batch, int64_t begin, int64_t head, int64_t rows) {
    k = q + rows * ldk;
    load_panel(in.q, batch, begin, head, rows, in.shape.K, 0, q, ldk);
    load_panel(in.k, batch, begin, head, rows, in.shape.K, 0, k, ldk);
    if (in.l2norm) normalize(q, ldk, rows, rq), normalize(k, ldk, rows, rk);
    transpose(k, ldk, rows, ldk, kT, ldc);
    gemm_lower(rows, in.shape.K, plain(k, ldk), kT, ldc, kk, ldc);
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
  Tables(Arena& arena, const ChunkShape& s) : ldc(round_up<T>(steps(s.C) * kStep)) {
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
      beta[i] = T(beta_of(pre, scalar(in.beta, batch, begin + i, head)));
    }
    for (int64_t i = rows; i < steps(rows) * kStep; ++i) beta[i] = 0;
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
    for (int64_t i = n; i < round_up<T>(n); ++i) x[i] = -1000;
    for (int64_t i = 0; i < n; i += kLanes<T>) store(x + i, decay_of<T>(DF_ISA::load(x + i)));
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

}  // namespace
}  // namespace df::cpu::DF_ISA
