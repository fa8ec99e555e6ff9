// Sums of a few partial results as a binary tree over their indices: the same bits however the
// leaves are cut into aligned powers of two, of which each is summed elsewhere.
#pragma once
#include <cstdint>

namespace df::cuda {
// x[i * stride] over base <= i < min(base + kLeaves, count); the missing leaves are zeros.
template <int kLeaves>
__device__ inline float tree_sum(const float* x, int64_t stride, int count, int base = 0) {
  if (base >= count) return 0;
  if constexpr (kLeaves == 1)
    return x[base * stride];
  else
    return tree_sum<kLeaves / 2>(x, stride, count, base) +
           tree_sum<kLeaves / 2>(x, stride, count, base + kLeaves / 2);
}
}  // namespace df::cuda
