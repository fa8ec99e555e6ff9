// MARS-AdamW on a list of tensors. Per element, with the constants of its tensor:
//   g = grad_scale raw,   c = clip (a g - b h),   m <- beta1 m + (1 - beta1) c
//   v <- beta2 v + (1 - beta2) c^2,   p <- p - (decay p + step_size m / (sqrt(v) rsqrt_bias2 +
//   eps))
// clip needs ||a g - b h|| first: chunks give partial sums, which the host adds in a fixed order.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"

namespace df {
constexpr int64_t kMarsChunk = 32768;  // elements of one work item, one partial sum

enum class MarsCaution { off, elementwise, mean };

struct MarsTensor {
  void *p, *m, *v, *vmax;  // vmax null: no amsgrad; m, v and vmax have p's compute type
  const void* g;
  void* h;  // null: the 1-D path, c = g
  int64_t n;
  DType p_type, g_type, h_type;
  bool write_h, cautious;
  double grad_scale;  // 1 / (loss scale), negative to maximize
  double a, b;        // a = 1 + s; b = s, with the sign that h was stored in
  double clip, beta1, beta2, eps, decay, step_size, rsqrt_bias2;
  double caution_scale;
};

namespace cpu {
// Elements [begin, end): the sum of (a g - b h)^2; how many have m g > 0 after the step; the step.
DF_DECLARE_CPU(mars_norm, const MarsTensor& t, int64_t begin, int64_t end, double* sum)
DF_DECLARE_CPU(mars_agreement, const MarsTensor& t, int64_t begin, int64_t end, double* count)
DF_DECLARE_CPU(mars_update, const MarsTensor& t, int64_t begin, int64_t end)
}  // namespace cpu
}  // namespace df
