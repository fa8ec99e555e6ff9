// The MARS family on lists of tensors. Per element, with the constants of its tensor:
//   g = g_scale raw,   c = clip (a g - b h),   m <- beta1 m + rest1 c,   d = m + extra g
//   adamw: v <- beta2 v + (1 - beta2) c^2,  u = d / (sqrt(max(v, vmax)) rsqrt_bias2 + eps)
//   lion: u = sign(d)     sgd: u = d     given: u = g     p <- p - (decay p + step_size u)
//   momentum: p <- d, the direction that a matrix function is then taken of
// clip needs ||a g - b h|| first: chunks give partial sums in double, added in a fixed order.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"

namespace df {
constexpr int64_t kMarsChunk = 32768;  // elements of one work item, one partial sum
constexpr int64_t kMarsQuantum = 256;  // elements of an 8-bit state that share a factor

enum class MarsRule : int32_t { adamw, lion, sgd, momentum, given };
enum class MarsCaution : int32_t { off, elementwise, mean };
enum class MarsMaster : int32_t { none, fp32, split16 };

// Tensors of one section share all of this; lr, weight_decay and gamma may come from the device.
struct MarsSection {
  MarsRule rule;
  MarsCaution caution;
  MarsMaster master;
  bool corrected;  // there is an h: c = (1 + s) g - s h, clipped; else c = g
  bool stateless;  // h is folded into m: m <- beta1 m + (1 - gamma) (1 - beta1) g, d = m + gamma g
  bool write_h;    // h <- g; else h is only read, in the sign of the raw gradient
  bool maximize;
  bool stochastic;  // bfloat16 parameters without a master are rounded at random
  double lr, weight_decay, gamma, beta1, beta2, eps, clip, factor;  // clip: inf for none
};

// What an element's update is computed with; the same for all elements of a tensor in one step.
struct MarsScalars {
  double g_scale, a, b, clip, beta1, rest1, extra, beta2, eps, decay, step_size, rsqrt_bias2;
  double caution_scale;
};

// n elements; absmax: data are 8-bit codes, absmax[i / kMarsQuantum] the factor of element i.
struct MarsArray {
  void* data = nullptr;
  DType type = DType::f32;
  float* absmax = nullptr;
};

struct MarsTensor {
  MarsArray p, m, v, vmax, h;
  const void* g;
  DType g_type;
  void* master;  // float [n], or the int16 low halves of split16
  int64_t n;
  int32_t section;
  uint32_t number;  // keys the random bits
};

// Of stochastic rounding; step counts this one.
struct MarsRandom {
  uint64_t seed;
  uint32_t step;
};

namespace cpu {
// Elements [begin, end), begin a multiple of kMarsChunk: the sum of (a g - b h)^2; how many have
// d g > 0; the step.
DF_DECLARE_CPU(mars_norm, const MarsTensor& t, const MarsScalars& x, int64_t begin, int64_t end,
               double* sum)
DF_DECLARE_CPU(mars_agreement, const MarsTensor& t, const MarsSection& section,
               const MarsScalars& x, int64_t begin, int64_t end, double* count)
DF_DECLARE_CPU(mars_update, const MarsTensor& t, const MarsSection& section, const MarsScalars& x,
               const MarsRandom& random, int64_t begin, int64_t end)
}  // namespace cpu
}  // namespace df
