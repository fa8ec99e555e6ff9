// The rotation as the CPU kernels see it: frequencies in both of their forms, one row an axis.
#pragma once
#include "common/isa.h"
#include "grape/rotary.h"

namespace df {
struct RotaryCpu {
  RotaryArgs args;
  const uint64_t* turns;  // [Hf, A, P], units of 2^-64 turns
  const double* theta;    // [Hf, A, P]
  bool finite;            // all of theta
  bool stream;            // the outputs go past the caches
  int64_t* bad_row;       // set to a position that the tables do not reach
};

// Bytes that a worker needs: cos, sin and sums of products, both of q and k, and three rows of
// intermediate numbers; rows are padded to whole vectors.
inline int64_t rotary_scratch(const RotaryArgs& p) {
  return (8 * p.Ha + 4) * 8 * (2 * p.P + 32);
}

namespace cpu {
// Tokens [first, last) of B T; scratch begins on a cache line.
DF_DECLARE_CPU(rotary_apply, const RotaryCpu&, int64_t first, int64_t last, void* scratch)
// The backward pass with gradients of angles or tables; sums [Hf, P, A] is added to.
DF_DECLARE_CPU(rotary_grads, const RotaryCpu&, const RotaryGrads&, int64_t first, int64_t last,
               double* sums, void* scratch)
}  // namespace cpu
}  // namespace df
