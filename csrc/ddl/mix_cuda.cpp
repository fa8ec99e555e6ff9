#include "common/cuda_shim.h"
#include "ddl/mix_host.h"

namespace df::cuda {
namespace {
MixFwdResult fwd(bool expand, const Tensor& x, const Tensor& w, const OptTensor& initial_state,
                 const OptTensor& cu_seqlens, bool output_final_state) {
  const MixTensors in = mix_tensors(expand, x, w, initial_state, cu_seqlens);
  const Tensor y = in.output();
  const Tensor final = output_final_state ? in.state(x.scalar_type()) : empty(x, {0});
  Launch launch(in.x, in.w, in.initial, in.cu_seqlens, y, final);
  const MixFwdArgs args = in.fwd(y, output_final_state ? &final : nullptr);
  by_type(args.dtype, &mix_fwd_f32_cuda, &mix_fwd_bf16_cuda, &mix_fwd_f16_cuda)(
      args, device_offsets(in.cu_seqlens, in.shape.N, in.shape.T), launch.stream());
  launch.check();
  return {y, final};
}

MixBwdResult bwd(bool expand, const Tensor& dy, const OptTensor& d_final, const Tensor& x,
                 const Tensor& w, const OptTensor& initial_state, const OptTensor& cu_seqlens) {
  const MixTensors in = mix_tensors(expand, x, w, initial_state, cu_seqlens);
  const MixGrads grads = mix_grads(in, dy, d_final);
  const auto [expands, B, T, N, d, dv, K] = in.shape;
  const int64_t rows = mix_partial_rows(in.shape, in.initial.has_value());
  const Tensor partial = empty(in.w, {rows, K, d, dv}), dw = empty(in.w, {K, d, dv});
  const MixSums sums{static_cast<float*>(partial.mutable_data_ptr()), rows,
                     static_cast<float*>(dw.mutable_data_ptr())};
  Launch launch(in.x, in.w, in.initial, in.cu_seqlens, grads.dy, grads.d_final, grads.dx,
                grads.d_initial, partial, dw);
  const MixBwdArgs args = grads.args(in);
  by_type(args.dtype, &mix_bwd_f32_cuda, &mix_bwd_bf16_cuda, &mix_bwd_f16_cuda)(
      args, sums, device_offsets(in.cu_seqlens, in.shape.N, in.shape.T), launch.stream());
  mix_sums_cuda(in.shape, sums, launch.stream());
  launch.check();
  return mix_results(grads, dw, w, initial_state);
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("ddl_tc_fwd", TORCH_BOX((&df::mix_fwd_op<false, &df::cuda::fwd>)));
  m.impl("ddl_tc_bwd", TORCH_BOX((&df::mix_bwd_op<false, &df::cuda::bwd>)));
  m.impl("ddl_ec_fwd", TORCH_BOX((&df::mix_fwd_op<true, &df::cuda::fwd>)));
  m.impl("ddl_ec_bwd", TORCH_BOX((&df::mix_bwd_op<true, &df::cuda::bwd>)));
}
