// The seam of the causal short convolution, depthwise over D channels with W taps:
//   z_t = bias + sum_i w_i x_{t-W+1+i};  y = silu(z) or z.
// Positions t are counted within a sequence; the W - 1 inputs before it are its history.
#pragma once
#include "common/isa.h"
#include "common/sequences.h"
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

// CUDA: weights and states in their public layouts, weight [D,W] and states [N,D,W-1], contiguous.
struct ConvDeviceInputs {
  int64_t B, T, N, D, W;
  Input x;
  Dense weight, bias, history;  // bias and history may be null; history is in x's dtype
  bool silu;

  // A CTA walks a chunk of tokens of one row. Chunks depend on the sizes alone, and with them the
  // bits of the taps' gradient: a partial sum each.
  constexpr int64_t chunk(bool backward) const {
    constexpr int64_t kThreads = 132 * 512;  // fill a GPU; 8 channels a thread
    int64_t tokens = backward ? 256 : 128;
    while (tokens > 16 && B * T * D < kThreads * 8 * tokens) tokens /= 2;
    return tokens;
  }
  constexpr int64_t chunks(bool backward) const {
    return B * ((T + chunk(backward) - 1) / chunk(backward));
  }
};

struct ConvDeviceFwd {
  ConvDeviceInputs in;
  void *y, *final_state;  // final_state may be null
};

struct ConvDeviceBwd {
  ConvDeviceInputs in;
  Input dy;       // in x's dtype
  Dense d_final;  // may be null
  void *dx, *d_initial;
  DType initial_type;
  float* partial;         // [chunks, W+1, D]
  void *dweight, *dbias;  // in the dtypes of weight and bias; dbias may be null
};

struct ConvDeviceUpdate {  // state in x's dtype, with any strides
  ConvDeviceInputs in;
  void *state, *y;
  int64_t state_b, state_d, state_w;
};

void conv_fwd_f32_cuda(const ConvDeviceFwd& args, const Offsets& offsets, void* stream);
void conv_fwd_bf16_cuda(const ConvDeviceFwd& args, const Offsets& offsets, void* stream);
void conv_fwd_f16_cuda(const ConvDeviceFwd& args, const Offsets& offsets, void* stream);
void conv_bwd_f32_cuda(const ConvDeviceBwd& args, const Offsets& offsets, void* stream);
void conv_bwd_bf16_cuda(const ConvDeviceBwd& args, const Offsets& offsets, void* stream);
void conv_bwd_f16_cuda(const ConvDeviceBwd& args, const Offsets& offsets, void* stream);
void conv_sums_cuda(const ConvDeviceBwd& args, void* stream);
void conv_update_cuda(const ConvDeviceUpdate& args, void* stream);  // not f64

namespace cpu {
DF_DECLARE_CPU(short_conv_fwd, const ConvFwdArgs&, const ConvTile&)
// Adds the gradients of weight and bias to sums [W+1,D], compute type.
DF_DECLARE_CPU(short_conv_bwd_scratch, const ConvBwdArgs&, int64_t* bytes)
DF_DECLARE_CPU(short_conv_bwd, const ConvBwdArgs&, const ConvTile&, void* sums, void* scratch)
constexpr int64_t kConvTile = 64;  // the longest tile
}  // namespace cpu
}  // namespace df
