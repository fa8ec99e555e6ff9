// z sigmoid(z) to 4 ulp: an exact division has a branch, here for every element. Below z = -87 it
// is 0, where silu(z) > -2^-119.
#pragma once

namespace df::cuda {
__device__ inline float silu(float z) {
  return __fdividef(z, 1 + expf(-z));
}
}  // namespace df::cuda
