// Host side of the short convolution on CUDA: checks, allocation, registration.
#include "common/cuda_shim.h"
#include "common/sequences_host.h"
#include "gated_delta/input_host.h"
#include "gated_delta/short_conv.h"

namespace df::cuda {
namespace {
struct ConvTensors {  // owns the copies where there were none
  Tensor x, weight;
  OptTensor bias, history, cu_seqlens;
  bool silu;

  int64_t N() const { return sequence_count(x, cu_seqlens); }
  Offsets offsets() const { return device_offsets(cu_seqlens, N(), x.size(1)); }
  ConvDeviceInputs args() const {
    return {
        x.size(0),     x.size(1),      N(),
        x.size(2),     weight.size(1), {x.const_data_ptr(), dtype(x), x.stride(0), x.stride(1), 0},
        dense(weight), dense(bias),    dense(history),
        silu};
  }
  Tensor like_x() const { return empty(x, {x.size(0), x.size(1), x.size(2)}); }
  Tensor state(ScalarType type) const {
    return empty(x, {N(), x.size(2), weight.size(1) - 1}, type);
  }
};

ConvTensors gather(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                   const OptTensor& initial_state, const OptTensor& cu_seqlens, bool silu) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && weight.size(0) == x.size(2),
                  "causal_conv1d: x must be [B,T,D] and weight [D,W]");
  STD_TORCH_CHECK(weight.size(1) >= 2 && weight.size(1) <= kMaxConvWidth,
                  "causal_conv1d: W = ", weight.size(1));
  ConvTensors in{unit_last_stride(x),       contiguous(weight),
                 contiguous(bias),          as(initial_state, x.scalar_type()),
                 dense_offsets(cu_seqlens), silu};
  STD_TORCH_CHECK(!initial_state || initial_state->size(0) == in.N(),
                  "causal_conv1d: initial_state of ", initial_state->size(0), " sequences, not ",
                  in.N());
  return in;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                               const OptTensor& initial_state, const OptTensor& cu_seqlens,
                               bool silu, bool output_final_state) {
  const ConvTensors in = gather(x, weight, bias, initial_state, cu_seqlens, silu);
  const Tensor y = in.like_x();
  const Tensor final = output_final_state ? in.state(x.scalar_type()) : empty(x, {0});
  Launch launch(in.x, in.weight, in.bias, in.history, in.cu_seqlens, y, final);
  const ConvDeviceFwd args{in.args(), y.mutable_data_ptr(),
                           output_final_state ? final.mutable_data_ptr() : nullptr};
  by_type(dtype(x), &conv_fwd_f32_cuda, &conv_fwd_bf16_cuda, &conv_fwd_f16_cuda)(args, in.offsets(),
                                                                                 launch.stream());
  launch.check();
  return {y, final};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& dy_, const OptTensor& d_final_,
                                               const Tensor& x, const Tensor& weight,
                                               const OptTensor& bias,
                                               const OptTensor& initial_state,
                                               const OptTensor& cu_seqlens, bool silu) {
  const ConvTensors in = gather(x, weight, bias, initial_state, cu_seqlens, silu);
  const Tensor dy = unit_last_stride(torch::stable::to(dy_, x.scalar_type()));
  const OptTensor d_final = contiguous(d_final_);
  const int64_t D = x.size(2), W = weight.size(1);
  ConvDeviceBwd args{};
  args.in = in.args();
  const Tensor dx = in.like_x(), dweight = empty(weight, {D, W});
  const Tensor dbias = bias ? empty(*bias, {D}) : empty(x, {0}, compute_type(x));
  const Tensor d_initial =
      initial_state ? in.state(initial_state->scalar_type()) : empty(x, {0}, compute_type(x));
  const Tensor partial = empty(x, {args.in.chunks(true), W + 1, D}, ScalarType::Float);
  args.dy = {dy.const_data_ptr(), dtype(dy), dy.stride(0), dy.stride(1), 0};
  args.d_final = dense(d_final);
  args.dx = dx.mutable_data_ptr(), args.dweight = dweight.mutable_data_ptr();
  args.dbias = bias ? dbias.mutable_data_ptr() : nullptr;
  args.d_initial = initial_state ? d_initial.mutable_data_ptr() : nullptr;
  args.initial_type = dtype(d_initial);
  args.partial = static_cast<float*>(partial.mutable_data_ptr());
  Launch launch(in.x, in.weight, in.bias, in.history, in.cu_seqlens, dy, d_final, dx, dweight,
                dbias, d_initial, partial);
  by_type(dtype(x), &conv_bwd_f32_cuda, &conv_bwd_bf16_cuda, &conv_bwd_f16_cuda)(args, in.offsets(),
                                                                                 launch.stream());
  conv_sums_cuda(args, launch.stream());
  launch.check();
  return {dx, dweight, dbias, d_initial};
}

Tensor update(const Tensor& x, const Tensor& state, const Tensor& weight, const OptTensor& bias,
              bool silu) {
  const ConvTensors in = gather(x, weight, bias, std::nullopt, std::nullopt, silu);
  STD_TORCH_CHECK(state.scalar_type() == x.scalar_type() && x.scalar_type() != ScalarType::Double,
                  "causal_conv1d_update: x and state must have one dtype, on CUDA not float64");
  const Tensor y = in.like_x();
  Launch launch(in.x, in.weight, in.bias, state, y);
  const ConvDeviceUpdate args{in.args(),       state.mutable_data_ptr(), y.mutable_data_ptr(),
                              state.stride(0), state.stride(1),          state.stride(2)};
  conv_update_cuda(args, launch.stream());
  launch.check();
  return y;
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&df::cuda::fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&df::cuda::bwd));
  m.impl("causal_conv1d_update", TORCH_BOX(&df::cuda::update));
}
