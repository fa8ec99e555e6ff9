// The chunk form in steps of kStep tokens, as the forward runs it and the backward where it
// recomputes: the C x C work grows with the step, so steps are as short as vectors allow, whatever
// the chunk size. A step of one head, on a tile of value columns whose part of S stays in L1:
//   [KS; QS] = [K; Q] S   (I + L diag(beta)) E = V - gam o KS   O = sc gam o QS + (P diag(beta)) E
//   S <- e^{G_C} S + K^T (del o beta o E),   L = strictlower(Gam o KK^T), P = sc lower(Gam o QK^T)
// E is solved by substitution in registers, a vector of columns at a time, and O summed from it
// there: neither an inverse nor U is in memory. Kernel files only.
#pragma once
#include "common/cpu/gemm.h"
#include "common/cpu/math.h"
#include "gated_delta/ahead.h"
#include "gated_delta/panels.h"

namespace df::cpu::DF_ISA {
namespace {
constexpr int64_t kStep = 16;
template <class T>
constexpr int64_t kTileColumns = 256 / int64_t(sizeof(T));

inline int64_t steps(int64_t rows) {
  return (rows + kStep - 1) / kStep;
}

// q^, k^ of a chunk and, within each step, their products; shared by the value heads of a group.
// Rows beyond the chunk hold anything, and so does what is computed from them.
template <class T>
struct StepKeys {
  T* kq;       // a step: kStep rows of k^, then those of q^
  T* kT;       // of one step
  T *kk, *qk;  // [C, kStep]
  T* norms;
  int64_t ldk;
  StepKeys(Arena& arena, const ChunkShape& s) : ldk(round_up<T>(s.K)) {
    const int64_t n = steps(s.C) * kStep;
    kq = arena.take<T>(2 * n * ldk), kT = arena.take<T>(round_up<T>(kStep) * ldk);
    kk = arena.take<T>(n * kStep), qk = arena.take<T>(n * kStep), norms = arena.take<T>(kStep);
  }
  const T* k(int64_t step) const { return kq + 2 * step * kStep * ldk; }
  const T* q(int64_t step) const { return k(step) + kStep * ldk; }

  void load(const ChunkInputs& in, int64_t batch, int64_t begin, int64_t head, int64_t rows,
            bool with_q) {
    for (int64_t i = 0; i < rows; i += kStep) {
      const int64_t n = rows - i < kStep ? rows - i : kStep;
      T *k = kq + 2 * i * ldk, *q = k + kStep * ldk;
      load_rows(in, in.k, batch, begin + i, head, n, k);
      transpose(k, ldk, kStep, ldk, kT, kStep);
      gemm_narrow(n, kStep, in.shape.K, k, ldk, kT, kk + i * kStep);
      if (!with_q) continue;
      load_rows(in, in.q, batch, begin + i, head, n, q);
      gemm_narrow(n, kStep, in.shape.K, q, ldk, kT, qk + i * kStep);
    }
  }

 private:
  void load_rows(const ChunkInputs& in, const Input& x, int64_t batch, int64_t begin, int64_t head,
                 int64_t rows, T* to) {
    load_panel(x, batch, begin, head, rows, in.shape.K, 0, to, ldk);
    if (in.l2norm) normalize(to, ldk, rows, norms);
  }
};

// Of one value head, per token: gam_i = e^{G_i} with and without the scale, beta_i del_i, the rows
// of -L diag(beta) and of P diag(beta); e^{G_C} per step. G is summed in double over a step. Right
// of the diagonal of L and P stands anything.
template <class T>
struct StepTables {
  T *gam, *read, *write, *lower, *P, *decay;
  StepTables(Arena& arena, const ChunkShape& s) {
    const int64_t n = steps(s.C) * kStep;
    gam = arena.take<T>(n), read = arena.take<T>(n), write = arena.take<T>(n);
    lower = arena.take<T>(n * kStep), P = arena.take<T>(n * kStep), decay = arena.take<T>(steps(n));
  }

  void load(const ChunkInputs& in, const StepKeys<T>& keys, int64_t batch, int64_t begin,
            int64_t head, int64_t rows) {
    const Gate gate_of_head = head_gate(in.pre, head);
    for (int64_t i = 0; i < rows; i += kStep) {
      const int64_t n = rows - i < kStep ? rows - i : kStep;
      alignas(64) double G[kStep] = {};
      alignas(64) T beta[kStep] = {};
      double sum = 0;
      for (int64_t t = 0; t < n; ++t) {
        const double raw = scalar(in.g, batch, begin + i + t, head);
        G[t] = sum += clamp_gate(in.pre.A_log.data ? gate(gate_of_head, raw) : raw);
        beta[t] = T(beta_of(in.pre, scalar(in.beta, batch, begin + i + t, head)));
      }
      fill(in, keys, G, beta, sum, i, n);
    }
  }

 private:
  [[gnu::noinline]] void fill(const ChunkInputs& in, const StepKeys<T>& keys, const double* G,
                              const T* beta, double sum, int64_t i, int64_t n) {
    constexpr int64_t L = kLanes<T>;
    const T scale = T(in.scale);
    alignas(64) T x[kStep];
    for (int64_t t = 0; t < kStep; ++t) gam[i + t] = T(G[t]), write[i + t] = T(sum - G[t]);
    for (int64_t c = i; c < i + kStep; c += L) {
      const Vec<T> decays = decay_of<T>(DF_ISA::load(gam + c));
      store(gam + c, decays), store(read + c, decays * scale);
      store(write + c, decay_of<T>(DF_ISA::load(write + c)) * DF_ISA::load(beta + c - i));
    }
    decay[i / kStep] = gam[i + n - 1];
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t j = 0; j < kStep; ++j) x[j] = T(G[t] - G[j]);
      for (int64_t j = 0, at = (i + t) * kStep; j < kStep; j += L) {
        const Vec<T> factor = decay_of<T>(DF_ISA::load(x + j)) * DF_ISA::load(beta + j);
        store(lower + at + j, -factor * DF_ISA::load(keys.kk + at + j));
        store(P + at + j, factor * scale * DF_ISA::load(keys.qk + at + j));
      }
    }
  }
};

// The panels of a step, kStep rows of a tile.
template <class T>
struct StepPanels {
  T *v, *products, *e, *u, *o;  // products: KS, then QS
  StepPanels(Arena& arena) {
    const int64_t n = kStep * kTileColumns<T>;
    v = arena.take<T>(n), products = arena.take<T>(2 * n);
    e = arena.take<T>(n), u = arena.take<T>(n), o = arena.take<T>(n);
  }
};

// E, del o U and, with kOutput, O of one vector of columns and the first kRows tokens of a step.
template <bool kOutput, int kRows, class T>
[[gnu::noinline]] void solve(const T* gam, const T* read, const T* write, const T* lower,
                             const T* P, const StepPanels<T>& b, int64_t ld, int64_t c) {
  constexpr int kHalf = kRows / 2;
  Vec<T> e[kRows];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
    e[i] = load(b.v + i * ld + c) - gam[i] * load(b.products + i * ld + c);
#pragma GCC unroll 16
  for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i)
      if (i > j) e[i] += lower[i * kStep + j] * e[j];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    store(b.e + i * ld + c, e[i]);
    store(b.u + i * ld + c, e[i] * write[i]);
  }
  if constexpr (!kOutput) return;
  const T* qs = b.products + kStep * ld + c;
#pragma GCC unroll 2
  for (int half = 0; half < kRows; half += kHalf) {
    Vec<T> o[kHalf];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) o[i] = load(qs + (half + i) * ld) * read[half + i];
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 16
      for (int i = 0; i < kHalf; ++i)
        if (half + i >= j) o[i] += P[(half + i) * kStep + j] * e[j];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) store(b.o + (half + i) * ld + c, o[i]);
  }
}

// One step of one head on a tile of ld columns: b.v is given, S advances, b.e and b.o result.
template <bool kOutput, class T>
void run_step(const ChunkInputs& in, const StepKeys<T>& keys, const StepTables<T>& t,
              const StepPanels<T>& b, int64_t step, int64_t rows, T* S, int64_t ld, Ahead& ahead) {
  const int64_t K = in.shape.K, ldk = keys.ldk, first = step * kStep;
  const T* k = keys.k(step);
  const auto prefetch = [&]() __attribute__((always_inline)) { ahead.some(); };
  if (kOutput && rows == kStep) {
    gemm(2 * kStep, ld, K, plain(k, ldk), S, ld, b.products, ld, 1, prefetch);
  } else {
    gemm(rows, ld, K, plain(k, ldk), S, ld, b.products, ld);
    if (kOutput) gemm(rows, ld, K, plain(keys.q(step), ldk), S, ld, b.products + kStep * ld, ld);
  }
  auto* const solve_rows = rows <= 4 ? &solve<kOutput, 4, T> : &solve<kOutput, int(kStep), T>;
  for (int64_t c = 0; c < ld; c += kLanes<T>) {
    solve_rows(t.gam + first, t.read + first, t.write + first, t.lower + first * kStep,
               t.P + first * kStep, b, ld, c);
  }
  if (rows == kStep)
    gemm_shallow<kStep>(K, ld, k, ldk, b.u, ld, S, ld, t.decay[step]);
  else
    gemm<Into::add>(K, ld, rows, transposed(k, ldk), b.u, ld, S, ld, t.decay[step]);
}
}  // namespace
}  // namespace df::cpu::DF_ISA
