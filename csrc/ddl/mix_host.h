// The convolutions' tensors to the plain arguments of mix.h, for every device.
#pragma once
#include "ddl/mix.h"
#include "ddl/sequences_host.h"

namespace df {
struct MixTensors {  // owns the copies where there were none
  MixShape shape;
  Tensor x, w;
  OptTensor initial, cu_seqlens;

  MixRows rows(const Tensor& t) const { return {t.const_data_ptr(), t.stride(0), t.stride(1)}; }
  MixFwdArgs fwd(const Tensor& y, const Tensor* final) const {
    return {shape,
            dtype(x),
            rows(x),
            w.const_data_ptr(),
            data(initial),
            y.mutable_data_ptr(),
            final ? final->mutable_data_ptr() : nullptr};
  }
  Tensor output() const {
    const auto [expand, B, T, N, d, dv, K] = shape;
    return expand ? empty(x, {B, T, d, dv}) : empty(x, {B, T, d});
  }
  Tensor state(ScalarType type) const { return empty(x, {shape.N, shape.in(), shape.K - 1}, type); }
};

inline MixTensors mix_tensors(bool expand, const Tensor& x, const Tensor& w,
                              const OptTensor& initial, const OptTensor& cu_seqlens) {
  const char* op = expand ? "ddl_expand" : "ddl_compress_tc";
  STD_TORCH_CHECK(w.dim() == 3 && x.dim() == (expand ? 3 : 4) && x.size(2) == w.size(1) &&
                      (expand || x.size(3) == w.size(2)),
                  op, ": x must be [B,T,d", expand ? "" : ",d_v", "] and w [K,d,d_v]");
  STD_TORCH_CHECK(w.size(2) >= 1 && w.size(2) <= 16, op, ": d_v = ", w.size(2));
  STD_TORCH_CHECK(!cu_seqlens || x.size(0) == 1, op, ": cu_seqlens with B = ", x.size(0));
  const MixShape shape{expand,    x.size(0), x.size(1), sequence_count(x, cu_seqlens),
                       w.size(1), w.size(2), w.size(0)};
  STD_TORCH_CHECK(!initial || (initial->dim() == 3 && initial->size(0) == shape.N &&
                               initial->size(1) == shape.in() && initial->size(2) == shape.K - 1),
                  op, ": initial_state must be [", shape.N, ",", shape.in(), ",", shape.K - 1, "]");
  return {shape, dense_tokens(x), as(w, compute_type(x)), as(initial, x.scalar_type()),
          dense_offsets(cu_seqlens)};
}

struct MixGrads {
  Tensor dy;
  OptTensor d_final;
  Tensor dx, d_initial;

  MixBwdArgs args(const MixTensors& in) const {
    return {
        in.shape,      dtype(in.x),           in.rows(in.x),
        in.rows(dy),   in.w.const_data_ptr(), data(in.initial),
        data(d_final), dx.mutable_data_ptr(), in.initial ? d_initial.mutable_data_ptr() : nullptr};
  }
};

inline MixGrads mix_grads(const MixTensors& in, const Tensor& dy, const OptTensor& d_final) {
  const ScalarType type = compute_type(in.x);
  const auto [expand, B, T, N, d, dv, K] = in.shape;
  return {dense_tokens(torch::stable::to(dy, in.x.scalar_type())), as(d_final, type),
          expand ? empty(in.x, {B, T, d}) : empty(in.x, {B, T, d, dv}),
          in.initial ? in.state(type) : empty(in.x, {0})};
}

using MixFwdResult = std::tuple<Tensor, Tensor>;
using MixBwdResult = std::tuple<Tensor, Tensor, Tensor>;

// The gradients in the types of their inputs.
inline MixBwdResult mix_results(const MixGrads& grads, const Tensor& dw, const Tensor& w,
                                const OptTensor& initial) {
  return {grads.dx, torch::stable::to(dw, w.scalar_type()),
          initial ? torch::stable::to(grads.d_initial, initial->scalar_type()) : grads.d_initial};
}

// Operators of one direction from a device's function for both.
template <bool expand, auto fwd>
MixFwdResult mix_fwd_op(const Tensor& x, const Tensor& w, const OptTensor& initial_state,
                        const OptTensor& cu_seqlens, bool output_final_state) {
  return fwd(expand, x, w, initial_state, cu_seqlens, output_final_state);
}
template <bool expand, auto bwd>
MixBwdResult mix_bwd_op(const Tensor& dy, const OptTensor& d_final_state, const Tensor& x,
                        const Tensor& w, const OptTensor& initial_state,
                        const OptTensor& cu_seqlens) {
  return bwd(expand, dy, d_final_state, x, w, initial_state, cu_seqlens);
}
}  // namespace df
