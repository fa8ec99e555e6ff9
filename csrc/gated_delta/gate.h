// The seam of the gate g = -exp(A_log) softplus(a + dt_bias) over a [rows, HV]. Heads are few, so
// kRepeat rows are taken as one long row, with the heads' constants repeated as often.
#pragma once
#include "common/isa.h"
#include "gated_delta/input.h"

namespace df {
struct GateArgs {
  static constexpr int64_t kRepeat = 16;  // a multiple of every vector's lanes
  DType dtype;                            // of a and da
  int64_t n;                              // elements
  int64_t period;                         // kRepeat * HV
  const void *a, *dg;                     // contiguous; dg in the compute type, as all below
  const void *rate, *dt_bias;             // [period]; rate = -exp(A_log)
  void *g, *da;
};

namespace cpu {
// Elements [first, last), first a multiple of period. Backward adds to sums [2, period]: the
// gradients of A_log and dt_bias.
DF_DECLARE_CPU(gdn_gate_fwd, const GateArgs&, int64_t first, int64_t last)
DF_DECLARE_CPU(gdn_gate_bwd, const GateArgs&, int64_t first, int64_t last, void* sums)
}  // namespace cpu
}  // namespace df
