// The seam of the causal short convolution, depthwise over D channels with W taps:
//   z_t = bias + sum_i w_i x_{t-W+1+i};  y = silu(z) or z.
// Positions t are counted within a sequence; the W - 1 inputs before it are its history.
#pragma once
#include "common/isa.h"
#include "gated_delta/chunk.h"

namespace df {
constexpr int64_t kMaxConvWidth = 8;

struct ConvInputs {
  Input x;  // [B,T,D]
  int64_t D, W;
  const void* weight;      // [W,D], oldest tap first; compute type, as bias
  const void* bias;        // [D], zeros without a bias
  const void* history;     // [N,W-1,D] in x's dtype, or one [W-1,D] of zeros for all sequences
  int64_t history_stride;  // elements from one sequence to the next
  const Sequence* sequences;
  bool silu;
};

struct ConvTile {  // tokens [begin, end) of a sequence; a backward tile may be empty
  int64_t sequence, begin, end;
};

struct ConvFwdArgs {
  ConvInputs in;
  int64_t T;
  void* y;  // [B,T,D], contiguous
};

struct ConvBwdArgs {
  ConvInputs in;
  int64_t T;
  Input dy;
  const void* d_final;  // [N,W-1,D], compute type; may be null, as d_initial
  void* dx;             // [B,T,D], contiguous
  void* d_initial;      // [N,W-1,D], compute type
};

namespace cpu {
DF_DECLARE_CPU(short_conv_fwd, const ConvFwdArgs&, const ConvTile&)
// Adds the gradients of weight and bias to sums [W+1,D], compute type.
DF_DECLARE_CPU(short_conv_bwd_scratch, const ConvBwdArgs&, int64_t* bytes)
DF_DECLARE_CPU(short_conv_bwd, const ConvBwdArgs&, const ConvTile&, void* sums, void* scratch)
constexpr int64_t kConvTile = 64;  // the longest tile
}  // namespace cpu
}  // namespace df
