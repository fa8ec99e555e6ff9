// Scalar functions of the operators, from the accurate library functions (expf, log1pf: at most
// 2 ulp), so that they hold without fast-math flags.
#pragma once

namespace df::cuda {
__device__ inline float sigmoid(float x) {
  return 1.0f / (1.0f + expf(-x));
}
__device__ inline float softplus(float x) {
  return x > 20.0f ? x : log1pf(expf(x));
}
}  // namespace df::cuda
