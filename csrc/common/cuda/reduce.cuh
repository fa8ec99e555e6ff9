// Sums over lanes of a warp; every lane gets the result, always added in the same order.
#pragma once

namespace df::cuda {
// Over kCount lanes (a power of two) that are kStride apart.
template <int kCount, int kStride = 1>
__device__ inline float lane_sum(float x) {
#pragma unroll
  for (int mask = kStride; mask < kCount * kStride; mask *= 2)
    x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}
}  // namespace df::cuda
