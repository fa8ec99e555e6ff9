// The seam of the row norms over the last dimension V:
//   gated RMS norm  y = r x * weight * silu(gate), r = (mean x^2 + eps)^-1/2;
//   l2norm          y = r x, r = (sum x^2 + eps)^-1/2.
#pragma once
#include "common/isa.h"
#include "gated_delta/input.h"

namespace df {
struct Rows {  // [rows, V], V contiguous
  const void* data = nullptr;
  int64_t stride = 0;
};

struct RowNormArgs {
  DType dtype;  // of all tensors but the weight
  int64_t V;
  double eps;
  Rows x, gate, dy;    // gate.data may be null; dy is for backward
  const void* weight;  // [V], compute type
  void* y;             // forward's result or dx, contiguous, as dgate
  void* dgate;
};

namespace cpu {
// Rows [first, last). Backward adds to dweight [V], compute type, and needs V elements of scratch.
DF_DECLARE_CPU(gated_norm_fwd, const RowNormArgs&, int64_t first, int64_t last)
DF_DECLARE_CPU(gated_norm_bwd, const RowNormArgs&, int64_t first, int64_t last, void* dweight,
               void* scratch)
DF_DECLARE_CPU(l2norm_fwd, const RowNormArgs&, int64_t first, int64_t last)
DF_DECLARE_CPU(l2norm_bwd, const RowNormArgs&, int64_t first, int64_t last)
}  // namespace cpu
}  // namespace df
