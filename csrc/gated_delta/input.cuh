// Elements of the inputs on the device.
#pragma once
#include "common/cuda/load.cuh"
#include "gated_delta/input.h"

namespace df::cuda {
__device__ inline int64_t offset(const Input& x, int64_t batch, int64_t token, int64_t head) {
  return batch * x.b + token * x.t + head * x.h;
}
template <class Source>  // Input or Dense
__device__ inline float load_any(const Source& x, int64_t i) {
  return load_any(x.data, x.dtype, i);
}
}  // namespace df::cuda
