// What host functions share that hand sequences to kernels: offsets, conversions, launchers by
// type.
#pragma once
#include "common/op.h"
#include "common/sequences.h"

namespace df {
inline Tensor as(const Tensor& t, ScalarType type) {
  return contiguous(torch::stable::to(t, type));
}
inline OptTensor as(const OptTensor& t, ScalarType type) {
  return t ? OptTensor(as(*t, type)) : t;
}
inline OptTensor dense_offsets(const OptTensor& t) {
  return t ? OptTensor(contiguous(*t)) : t;
}
inline int64_t sequence_count(const Tensor& x, const OptTensor& cu_seqlens) {
  return cu_seqlens ? cu_seqlens->numel() - 1 : x.size(0);
}
inline Offsets device_offsets(const OptTensor& cu_seqlens, int64_t N, int64_t T) {
  return {data(cu_seqlens), cu_seqlens && cu_seqlens->scalar_type() == ScalarType::Long, N, T};
}
// The launcher of a type.
template <class Fn>
Fn* by_type(DType type, Fn* f32, Fn* bf16, Fn* f16) {
  STD_TORCH_CHECK(type != DType::f64, "deltafuse: no float64 kernel on CUDA");
  return type == DType::f32 ? f32 : type == DType::bf16 ? bf16 : f16;
}
}  // namespace df
