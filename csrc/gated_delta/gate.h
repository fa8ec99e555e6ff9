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

// CUDA: a [rows, HV], contiguous, as are the others; g and dg are float.
struct GateLaunch {
  int64_t rows, HV;
  Dense a, A_log, dt_bias;  // dt_bias may be null
  const void* dg;
  void *g, *da;
  float* partial;           // backward: [ctas(), 2, HV]
  void *dA_log, *ddt_bias;  // of the types of A_log and dt_bias; ddt_bias may be null

  // A CTA has `block` heads in its threads, kVec each, and walks down its part of the rows.
  static constexpr int kThreads = 256, kVec = 4;
  constexpr int64_t groups() const { return (HV + kVec - 1) / kVec; }  // of heads
  constexpr int64_t block() const { return groups() < kThreads ? groups() : kThreads; }
  constexpr int64_t blocks() const { return (groups() + block() - 1) / block(); }
  constexpr int64_t ctas() const {  // along the rows: some 16 a thread, at most 4 CTAs an SM
    const int64_t each = 16 * (kThreads / block()), all = (rows + each - 1) / each;
    return all < 4 * 132 ? all : 4 * 132;
  }
};
void gate_fwd_cuda(const GateLaunch& launch, void* stream);  // not f64
void gate_bwd_cuda(const GateLaunch& launch, void* stream);

namespace cpu {
// Elements [first, last), first a multiple of period. Backward adds to sums [2, period]: the
// gradients of A_log and dt_bias.
DF_DECLARE_CPU(gdn_gate_fwd, const GateArgs&, int64_t first, int64_t last)
DF_DECLARE_CPU(gdn_gate_bwd, const GateArgs&, int64_t first, int64_t last, void* sums)
}  // namespace cpu
}  // namespace df
