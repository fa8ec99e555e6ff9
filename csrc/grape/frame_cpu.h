// The rotation as the CPU kernels see it: a task is up to kFrameTile tokens of one head.
#pragma once
#include "common/isa.h"
#include "grape/frame.h"

namespace df {
constexpr int kFrameTile = 32;

struct FrameCpu {
  FrameArgs args;
  int64_t D, K;  // D and 2 r, padded to whole 64 bytes of the compute type
  // In the compute type, zeros in the padding; null: W = I, planes are neighbouring channels.
  const void* W;   // [H, D, K]
  const void* Wt;  // [H, 2 r, D]
};

// Sums over tokens for a head, in elements of the compute type. The pairs hold, for each of four
// parts (real and imaginary, commuting and not), an [r, r] matrix of which j <= k is used.
struct FrameSums {
  int64_t planes, across, pairs, dtheta, total;

  explicit FrameSums(const FrameCpu& p)
      : planes(0),                                        // [2 r, D]: dW^T or P^T
        across(planes + (p.W ? 2 * p.args.r * p.D : 0)),  // [2 r, K]: (e u^T + c v^T)^T
        pairs(across + (p.args.generator ? 2 * p.args.r * p.K : 0)),
        dtheta(pairs + (p.args.generator ? 4 * p.args.r * p.args.r : 0)),
        total(dtheta + p.args.r) {}
};

// Elements of the compute type that a worker needs.
inline int64_t frame_scratch(const FrameCpu& p) {
  const int64_t planes = p.K * kFrameTile, rows = p.D * kFrameTile;
  return 3 * rows + 10 * planes + 4 * kFrameTile + 64;
}

namespace cpu {
// Tokens [first, last) of head h; tokens are counted through [B, T]. wide: the type is double.
DF_DECLARE_CPU(frame_fwd, const FrameCpu&, bool wide, int64_t h, int64_t first, int64_t last,
               void* scratch)
// sums: FrameSums of the head, added to; null: none are wanted.
DF_DECLARE_CPU(frame_bwd, const FrameCpu&, bool wide, int64_t h, int64_t first, int64_t last,
               void* sums, void* scratch)
// Householder tridiagonalisation Q^T L Q of a skew L [n, n], which is overwritten; e [n - 1] is
// its superdiagonal, Q [n, n]. scratch: 2 n.
DF_DECLARE_CPU(skew_tridiagonal, int64_t n, double* L, double* e, double* Q, double* scratch)
}  // namespace cpu
}  // namespace df
