// Host side of the per-token form on CUDA: allocation, registration.
#include "common/cuda_shim.h"
#include "common/sequences_host.h"
#include "gated_delta/recurrent_host.h"

namespace df::cuda {
namespace {
RecurrentTensors tensors(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& g,
                         const OptTensor& gk, const OptTensor& gv, const OptTensor& beta,
                         const OptTensor& initial_state, const OptTensor& A_log,
                         const OptTensor& dt_bias) {
  const auto narrow = [&](const OptTensor& t) { return t ? OptTensor(readable(*t, q)) : t; };
  return recurrent_tensors(q, k, v, narrow(g), gk, gv, narrow(beta),
                           as(initial_state, ScalarType::Float), A_log, dt_bias);
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptTensor& g, const OptTensor& gk, const OptTensor& gv,
                               const OptTensor& beta, const OptTensor& initial_state,
                               const OptTensor& cu_seqlens_, const OptTensor& A_log,
                               const OptTensor& dt_bias, double scale, bool l2norm,
                               double sigmoid_scale, bool state_v_first, bool output_final_state) {
  const RecurrentTensors in = tensors(q, k, v, g, gk, gv, beta, initial_state, A_log, dt_bias);
  const OptTensor cu_seqlens = dense_offsets(cu_seqlens_);
  RecurrentFwdArgs args{in.args(scale, l2norm, sigmoid_scale, state_v_first, nullptr)};
  const ChunkShape& s = args.x.in.shape;
  const int64_t N = sequence_count(q, cu_seqlens);
  const Tensor o = empty(q, {q.size(0), s.T, s.HV, s.V});
  const Tensor final_state = empty_states(q, output_final_state, N, s, state_v_first);
  args.o = o.mutable_data_ptr();
  args.final_state = output_final_state ? final_state.mutable_data_ptr() : nullptr;
  Launch launch(in.q, in.k, in.v, in.g, in.gk, in.gv, in.beta, in.initial_state, in.A_log,
                in.dt_bias, cu_seqlens, o, final_state);
  by_type(dtype(q), &recurrent_fwd_f32_cuda, &recurrent_fwd_bf16_cuda, &recurrent_fwd_f16_cuda)(
      args, device_offsets(cu_seqlens, N, s.T), launch.stream());
  launch.check();
  return {o, final_state};
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("gated_delta_recurrent_fwd", TORCH_BOX(&df::cuda::fwd));
}
