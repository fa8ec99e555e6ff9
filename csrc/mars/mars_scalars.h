// The constants of one tensor's step from its section's hyper-parameters (mars.md 2.1), on the host
// and on the device. static: copies for different instruction sets must not be merged.
#pragma once
#include <cmath>

#include "mars/mars.h"

#if defined(__CUDACC__)
#define DF_HOST_DEVICE static __host__ __device__
#else
#define DF_HOST_DEVICE static
#endif

namespace df {
constexpr double kMarsMaxStep = 1 << 24;    // float32 counts no further
constexpr double kMarsMinAgreement = 1e-3;  // of caution: smallest fraction that is divided by

// `step` counts this step. clip and caution_scale are 1: they depend on the tensor's elements.
DF_HOST_DEVICE inline MarsScalars mars_scalars(const MarsSection& x, double lr, double weight_decay,
                                               double gamma, double step, double grad_scale) {
  const double s = gamma * x.beta1 / (1 - x.beta1);
  MarsScalars y;
  y.g_scale = (x.maximize ? -1 : 1) / grad_scale;
  y.a = x.corrected ? 1 + s : x.stateless ? 1 - gamma : 1;
  y.b = x.corrected ? (x.maximize && !x.write_h ? -s : s) : 0;
  y.clip = y.caution_scale = 1;
  y.beta1 = x.beta1, y.rest1 = 1 - x.beta1;
  y.extra = x.stateless ? gamma : 0;
  y.beta2 = x.beta2, y.eps = x.eps;
  y.decay = lr * weight_decay;
  y.step_size = lr * x.factor, y.rsqrt_bias2 = 1;
  if (x.rule == MarsRule::adamw) {  // 1 - beta^step without cancellation
    y.step_size /= -expm1(step * log(x.beta1));
    y.rsqrt_bias2 = 1 / sqrt(-expm1(step * log(x.beta2)));
  }
  return y;
}

// Not min(): a norm of NaN has to reach the tensor.
DF_HOST_DEVICE inline double mars_clip(double norm, double clip) {
  return norm <= clip ? 1 : clip / norm;
}
}  // namespace df
