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

// CUDA: both norms are one kernel. args.weight has any type, null is 1.
struct RowNormLaunch {
  RowNormArgs args;
  int64_t rows;
  DType weight_type;
  bool mean;       // of the squares, else their sum
  bool vectors;    // every row is made of whole 16-byte pieces
  float* partial;  // backward, with a weight: [partial_rows(), V]

  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  // A row of at most 32 pieces is held by 1 to 32 lanes, a piece each; a wider one by a warp.
  constexpr bool wide() const {
    return args.V > 32 * (!vectors ? 1 : args.dtype == DType::f32 ? 4 : 8);
  }
  constexpr int64_t ctas(int64_t most) const {
    const int64_t all = (rows + kWarps - 1) / kWarps;
    return all < most ? all : most;
  }
  constexpr int64_t backward_ctas() const { return ctas(2 * 132); }  // two an SM
  constexpr int64_t partial_rows() const { return backward_ctas() * (wide() ? kWarps : 1); }
};
void row_norm_fwd_f32_cuda(const RowNormLaunch& launch, void* stream);
void row_norm_fwd_bf16_cuda(const RowNormLaunch& launch, void* stream);
void row_norm_fwd_f16_cuda(const RowNormLaunch& launch, void* stream);
void row_norm_bwd_f32_cuda(const RowNormLaunch& launch, void* dweight, void* stream);
void row_norm_bwd_bf16_cuda(const RowNormLaunch& launch, void* dweight, void* stream);
void row_norm_bwd_f16_cuda(const RowNormLaunch& launch, void* dweight, void* stream);

namespace cpu {
// Rows [first, last). Backward adds to dweight [V], compute type, and needs V elements of scratch.
DF_DECLARE_CPU(gated_norm_fwd, const RowNormArgs&, int64_t first, int64_t last)
DF_DECLARE_CPU(gated_norm_bwd, const RowNormArgs&, int64_t first, int64_t last, void* dweight,
               void* scratch)
DF_DECLARE_CPU(l2norm_fwd, const RowNormArgs&, int64_t first, int64_t last)
DF_DECLARE_CPU(l2norm_bwd, const RowNormArgs&, int64_t first, int64_t last)
}  // namespace cpu
}  // namespace df
