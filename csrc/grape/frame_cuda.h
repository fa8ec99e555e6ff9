// The rotation as the CUDA kernels see it, and their launchers.
#pragma once
#include "grape/frame.h"

namespace df {
constexpr int kFrameMaxD = 256;
constexpr int kFrameFused = 4;  // the most planes whose sums fit into registers

struct FrameCuda {
  FrameArgs args;        // pointers of the device; B = 1 where batch and time are one axis
  const void* W;         // [H, D, 2 r]; null: planes are neighbouring channels
  bool W_double;         // else float
  bool vectors;          // rows of x, g and y are on 16-byte boundaries
  int64_t span, splits;  // tokens a CTA, spans
  int64_t pair_span, pair_splits;  // of frame_pairs_cuda
  float* coefs;                    // [N, H, r, 4]: c and e of a plane; null: no sums are wanted
  float* products;  // [splits, H, 2 r, D]: parts of dW^T or P^T; without W [splits, H, r] of dtheta
  float* pairs;     // [pair_splits, H, r, r, 8]: parts of M2 and Q; without generator [., H, r]
  float *dW, *K, *dtheta;  // results
};

// By the element type: rotation, planes without W, the backward passes.
#define DF_FRAME_LAUNCHERS(type)                                \
  void frame_fwd_##type##_cuda(const FrameCuda&, void* stream); \
  void frame_bwd_##type##_cuda(const FrameCuda&, void* stream); \
  void frame_channels_##type##_cuda(const FrameCuda&, bool backward, void* stream);
DF_FRAME_LAUNCHERS(f32)
DF_FRAME_LAUNCHERS(bf16)
DF_FRAME_LAUNCHERS(f16)
#undef DF_FRAME_LAUNCHERS
void frame_pairs_cuda(const FrameCuda&, void* stream);   // coefs to pairs
void frame_finish_cuda(const FrameCuda&, void* stream);  // parts to results
}  // namespace df
