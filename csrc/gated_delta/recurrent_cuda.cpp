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

// Fewer warps, and with them smaller tiles, while there is not a CTA for every SM.
int64_t backward_warps(const RecurrentBwdLaunch& p) {
  const int64_t V = p.shape().V, rows = p.rows_per_warp();
  int64_t warps = p.kMostWarps;
  const auto ctas = [&] {
    return p.offsets.N * p.shape().HV * ((V + warps * rows - 1) / (warps * rows));
  };
  while (warps > 1 && (ctas() < 132 || warps / 2 * rows >= V)) warps /= 2;
  return warps;
}

struct Workspace {  // of the backward, float
  Tensor checkpoints, starts, origins, keys, gates, sums;
  Workspace(const Tensor& q, RecurrentBwdLaunch& p) {
    const ChunkShape& s = p.shape();
    const auto floats = [&](int64_t n) { return empty(q, {n}, ScalarType::Float); };
    const auto at = [](const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); };
    const int64_t state = s.HV * p.tiles() * p.state_floats();
    const int64_t results = p.tiles() * p.tokens() * s.HV * 2;
    checkpoints = floats(p.checkpoint_slots() * state), starts = floats(p.start_slots() * state);
    const bool given = p.args.x.in.initial_state.data;
    origins = floats(given ? p.offsets.N * state : 0);
    p.origins = given ? at(origins) : nullptr;
    keys = floats(results * s.K), gates = floats(results);
    sums = floats(p.dA_log ? p.sum_rows() * 2 * s.HV : 0);
    p.checkpoints = at(checkpoints), p.starts = at(starts), p.keys = at(keys);
    p.gates = at(gates), p.sums = p.dA_log ? at(sums) : nullptr;
  }
};

RecurrentGradients bwd(const Tensor& d_o_, const OptTensor& d_final_state_, const Tensor& q,
                       const Tensor& k, const Tensor& v, const OptTensor& g, const OptTensor& beta,
                       const OptTensor& initial_state, const OptTensor& cu_seqlens_,
                       const OptTensor& A_log, const OptTensor& dt_bias, double scale, bool l2norm,
                       double sigmoid_scale, bool state_v_first) {
  const OptTensor none;
  const RecurrentTensors in = tensors(q, k, v, g, none, none, beta, initial_state, A_log, dt_bias);
  const OptTensor cu_seqlens = dense_offsets(cu_seqlens_);
  const OptTensor d_final_state = as(d_final_state_, ScalarType::Float);
  const Tensor d_o = unit_last_stride(torch::stable::to(d_o_, q.scalar_type()));
  const int64_t N = sequence_count(q, cu_seqlens);
  RecurrentBwdLaunch p{};
  p.args.x = in.args(scale, l2norm, sigmoid_scale, state_v_first, nullptr);
  p.args.d_o = input(d_o), p.args.d_final_state = dense(d_final_state);
  const ChunkShape& s = p.shape();
  p.B = q.size(0), p.offsets = device_offsets(cu_seqlens, N, s.T);
  p.warps = backward_warps(p);
  const Tensor dq = empty(q, {p.B, s.T, s.H, s.K}), dk = empty(q, {p.B, s.T, s.H, s.K});
  const Tensor dv = empty(q, {p.B, s.T, s.HV, s.V});
  const Tensor dg = empty_as(g, q), dbeta = empty_as(beta, q);
  const Tensor dh0 = empty_states(q, initial_state.has_value(), N, s, state_v_first);
  const Tensor dA_log = A_log ? empty(*A_log, {s.HV}) : empty_as(none, q);
  const Tensor ddt_bias = dt_bias ? empty(*dt_bias, {s.HV}) : empty_as(none, q);
  p.args.dq = dq.mutable_data_ptr(), p.args.dk = dk.mutable_data_ptr();
  p.args.dv = dv.mutable_data_ptr();
  p.args.dg = g ? dg.mutable_data_ptr() : nullptr;
  p.args.dbeta = beta ? dbeta.mutable_data_ptr() : nullptr;
  p.args.d_initial_state = initial_state ? dh0.mutable_data_ptr() : nullptr;
  p.dA_log = A_log ? dA_log.mutable_data_ptr() : nullptr;
  p.ddt_bias = dt_bias ? ddt_bias.mutable_data_ptr() : nullptr;
  const Workspace work(q, p);
  Launch launch(in.q, in.k, in.v, in.g, in.beta, in.initial_state, in.A_log, in.dt_bias, cu_seqlens,
                d_o, d_final_state, dq, dk, dv, dg, dbeta, dh0, dA_log, ddt_bias, work.checkpoints,
                work.starts, work.origins, work.keys, work.gates, work.sums);
  by_type(dtype(q), &recurrent_bwd_f32_cuda, &recurrent_bwd_bf16_cuda, &recurrent_bwd_f16_cuda)(
      p, launch.stream());
  recurrent_bwd_sums_cuda(p, launch.stream());
  launch.check();
  return {dq, dk, dv, like(dg, g), like(dbeta, beta), like(dh0, initial_state), dA_log, ddt_bias};
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("gated_delta_recurrent_fwd", TORCH_BOX(&df::cuda::fwd));
  m.impl("gated_delta_recurrent_bwd", TORCH_BOX(&df::cuda::bwd));
}
