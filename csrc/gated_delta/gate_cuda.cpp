// Host side of the gate on CUDA: checks, allocation, registration. a is [rows, HV].
#include "common/cuda_shim.h"
#include "common/sequences_host.h"
#include "gated_delta/gate.h"
#include "gated_delta/input_host.h"

namespace df::cuda {
namespace {
struct GateTensors {  // owns the copies where there were none
  Tensor a, A_log;
  OptTensor dt_bias;
  GateLaunch launch() const {
    GateLaunch launch{};
    launch.rows = a.size(0), launch.HV = a.size(1);
    launch.a = dense(a), launch.A_log = dense(A_log), launch.dt_bias = dense(dt_bias);
    return launch;
  }
};
GateTensors gather(const Tensor& a, const Tensor& A_log, const OptTensor& dt_bias) {
  STD_TORCH_CHECK(a.dim() == 2 && A_log.dim() == 1 && A_log.size(0) == a.size(1),
                  "fused_gdn_gate: a must be [rows,HV] and A_log [HV]");
  STD_TORCH_CHECK(a.scalar_type() != ScalarType::Double, "fused_gdn_gate: no float64 on CUDA");
  return {contiguous(a), contiguous(A_log), contiguous(dt_bias)};
}

Tensor fwd(const Tensor& a, const Tensor& A_log, const OptTensor& dt_bias) {
  const GateTensors in = gather(a, A_log, dt_bias);
  const Tensor g = empty(a, {a.size(0), a.size(1)}, ScalarType::Float);
  GateLaunch gate = in.launch();
  gate.g = g.mutable_data_ptr();
  Launch launch(in.a, in.A_log, in.dt_bias, g);
  gate_fwd_cuda(gate, launch.stream());
  launch.check();
  return g;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& dg_, const Tensor& a, const Tensor& A_log,
                                       const OptTensor& dt_bias) {
  const GateTensors in = gather(a, A_log, dt_bias);
  const int64_t HV = a.size(1);
  const Tensor dg = as(dg_, ScalarType::Float), da = empty(a, {a.size(0), HV});
  const Tensor dA_log = empty(A_log, {HV});
  const Tensor ddt_bias = dt_bias ? empty(*dt_bias, {HV}) : empty(a, {0});
  GateLaunch gate = in.launch();
  const Tensor partial = empty(a, {gate.ctas(), 2, HV}, ScalarType::Float);
  gate.dg = dg.const_data_ptr(), gate.da = da.mutable_data_ptr();
  gate.partial = static_cast<float*>(partial.mutable_data_ptr());
  gate.dA_log = dA_log.mutable_data_ptr();
  gate.ddt_bias = dt_bias ? ddt_bias.mutable_data_ptr() : nullptr;
  Launch launch(in.a, in.A_log, in.dt_bias, dg, da, partial, dA_log, ddt_bias);
  gate_bwd_cuda(gate, launch.stream());
  launch.check();
  return {da, dA_log, ddt_bias};
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("gdn_gate_fwd", TORCH_BOX(&df::cuda::fwd));
  m.impl("gdn_gate_bwd", TORCH_BOX(&df::cuda::bwd));
}
