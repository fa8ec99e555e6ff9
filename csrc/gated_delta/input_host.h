// Tensors to the plain arguments of input.h.
#pragma once
#include "common/op.h"
#include "gated_delta/input.h"

namespace df {
// A tensor whose last stride (that of a 4-d tensor's D) is 1.
inline Input input(const Tensor& t) {
  return {t.const_data_ptr(), dtype(t), t.stride(0), t.stride(1), t.stride(2)};
}
inline Dense dense(const Tensor& t) {
  return {t.const_data_ptr(), dtype(t)};
}
inline Dense dense(const OptTensor& t) {
  return t ? dense(*t) : Dense{};
}
inline OptTensor contiguous(const OptTensor& t) {
  return t ? OptTensor(torch::stable::contiguous(*t)) : t;
}

constexpr int64_t kMaxHeadDim = 256;

// Kernels read any type that is computed in q's compute type; another one (float64 beside float32)
// is converted here.
inline Tensor readable(const Tensor& t, const Tensor& q) {
  return compute_type(t) == compute_type(q) ? t : torch::stable::to(t, compute_type(q));
}
inline OptTensor readable_state(const OptTensor& t, const Tensor& q) {
  return t ? OptTensor(torch::stable::contiguous(readable(*t, q))) : t;
}
}  // namespace df
