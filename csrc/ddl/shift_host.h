// The token shift's tensors to the plain arguments of shift.h, for every device.
#pragma once
#include "ddl/sequences_host.h"
#include "ddl/shift.h"

namespace df {
inline ShiftHeads shift_heads(const Tensor& t) {
  return {t.const_data_ptr(), dtype(t), t.stride(0), t.stride(1), t.stride(2)};
}

struct ShiftTensors {  // owns the copies where there were none
  ShiftShape shape;
  Tensor x, previous, current;
  OptTensor cache, cu_seqlens;
  ShiftFwdArgs fwd(const Tensor& y, const Tensor* last) const {
    return {shape,
            shift_heads(x),
            shift_heads(previous),
            shift_heads(current),
            data(cache),
            y.mutable_data_ptr(),
            last ? last->mutable_data_ptr() : nullptr};
  }
  Tensor state(ScalarType type) const { return empty(x, {shape.N, shape.H, shape.D}, type); }
};

inline ShiftTensors shift_tensors(const Tensor& x, const Tensor& previous, const Tensor& current,
                                  const OptTensor& cache, const OptTensor& cu_seqlens) {
  STD_TORCH_CHECK(x.dim() == 4, "token_shift: x must be [B,T,H,D]");
  for (const Tensor* w : {&previous, &current})
    STD_TORCH_CHECK(w->dim() == 3 && w->size(0) == x.size(0) && w->size(1) == x.size(1) &&
                        w->size(2) == x.size(2),
                    "token_shift: the weights must be [B,T,H] with those of x");
  STD_TORCH_CHECK(!cu_seqlens || x.size(0) == 1, "token_shift: cu_seqlens with B = ", x.size(0));
  const ShiftShape shape{x.size(0), x.size(1), sequence_count(x, cu_seqlens), x.size(2), x.size(3)};
  STD_TORCH_CHECK(!cache || (cache->dim() == 3 && cache->size(0) == shape.N &&
                             cache->size(1) == shape.H && cache->size(2) == shape.D),
                  "token_shift: cache must be [", shape.N, ",", shape.H, ",", shape.D, "]");
  const ScalarType type = compute_type(x);
  return {shape,
          unit_last_stride(x),
          torch::stable::to(previous, type),
          torch::stable::to(current, type),
          as(cache, x.scalar_type()),
          dense_offsets(cu_seqlens)};
}

struct ShiftGrads {
  Tensor dy;
  OptTensor d_last;
  Tensor dx, d_cache, d_previous, d_current;

  ShiftBwdArgs args(const ShiftTensors& in) const {
    return {in.shape,
            shift_heads(in.x),
            shift_heads(in.previous),
            shift_heads(in.current),
            shift_heads(dy),
            data(in.cache),
            data(d_last),
            dx.mutable_data_ptr(),
            in.cache ? d_cache.mutable_data_ptr() : nullptr,
            d_previous.mutable_data_ptr(),
            d_current.mutable_data_ptr()};
  }
};

inline ShiftGrads shift_grads(const ShiftTensors& in, const Tensor& dy, const OptTensor& d_last) {
  const ScalarType type = compute_type(in.x);
  const auto [B, T, N, H, D] = in.shape;
  return {unit_last_stride(torch::stable::to(dy, in.x.scalar_type())),
          as(d_last, type),
          empty(in.x, {B, T, H, D}),
          in.cache ? in.state(type) : empty(in.x, {0}),
          empty(in.x, {B, T, H}, type),
          empty(in.x, {B, T, H}, type)};
}

// The results in the types of their inputs.
inline std::tuple<Tensor, Tensor, Tensor, Tensor> shift_results(const ShiftGrads& grads,
                                                                const Tensor& previous,
                                                                const Tensor& current,
                                                                const OptTensor& cache) {
  const auto to = [](const Tensor& t, const Tensor& like) {
    return torch::stable::to(t, like.scalar_type());
  };
  return {grads.dx, to(grads.d_previous, previous), to(grads.d_current, current),
          cache ? to(grads.d_cache, *cache) : grads.d_cache};
}
}  // namespace df
