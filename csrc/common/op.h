// Operator code's only include of torch's stable headers: namespace, registration, tensors.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "common/huge_pages.h"

// A test library for the emulator defines both: its own namespace, CUDA kernels on CPU tensors.
#ifndef DF_NAMESPACE
#define DF_NAMESPACE deltafuse
#define DF_CUDA CUDA
#endif
// One level more than torch's macros, which stringize their arguments unexpanded.
#define DF_EXPAND(macro, ...) macro(__VA_ARGS__)
#define DF_LIBRARY(m) DF_EXPAND(STABLE_TORCH_LIBRARY, DF_NAMESPACE, m)
#define DF_SCHEMAS(m) DF_EXPAND(STABLE_TORCH_LIBRARY_FRAGMENT, DF_NAMESPACE, m)
#define DF_IMPL(key, m) DF_EXPAND(STABLE_TORCH_LIBRARY_IMPL, DF_NAMESPACE, key, m)

namespace df {
using torch::headeronly::ScalarType;
using torch::stable::contiguous;
using torch::stable::empty_like;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

inline DType dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, "expected float32, float64, bfloat16 or float16");
  }
}

// The type of accumulators, states and gates: double for double, else float.
inline ScalarType compute_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  const Tensor t = torch::stable::new_empty(like, sizes, type);
  if (t.is_cpu()) advise_huge_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return empty(like, sizes, like.scalar_type());
}

// Kernels take any strides but the last, which has to be 1.
inline Tensor unit_last_stride(const Tensor& t) {
  return t.dim() == 0 || t.stride(t.dim() - 1) == 1 ? t : contiguous(t);
}

inline const void* data(const Tensor& t) {
  return t.const_data_ptr();
}
inline const void* data(const OptTensor& t) {
  return t ? t->const_data_ptr() : nullptr;
}
}  // namespace df
