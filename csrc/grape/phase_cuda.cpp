// Host side of the contextual phase on CUDA.
#include "common/cuda_shim.h"
#include "grape/phase_host.h"

namespace df::cuda {
namespace {
std::tuple<Tensor, Tensor> fwd(const Tensor& omega, const OptTensor& cu_seqlens,
                               const OptTensor& initial) {
  const PhaseInputs in(omega, cu_seqlens, initial);
  const Tensor phi = in.made(), final = empty(omega, {in.N(), omega.size(2)}, ScalarType::Long);
  PhaseArgs p = in.args(phi);
  p.final = final.mutable_data_ptr<int64_t>();
  if (p.N * p.M == 0) return {phi, final};
  Launch launch(in.in, in.cu_seqlens, in.initial, phi, final);
  phase_fwd_cuda(p, launch.stream());
  launch.check();
  return {phi, final};
}

Tensor bwd(const Tensor& d_phi, const OptTensor& cu_seqlens) {
  const PhaseInputs in(d_phi, cu_seqlens, std::nullopt);
  const Tensor d_omega = in.made();
  const PhaseArgs p = in.args(d_omega);
  if (p.N * p.M * p.T == 0) return d_omega;
  Launch launch(in.in, in.cu_seqlens, d_omega);
  phase_bwd_cuda(p, launch.stream());
  launch.check();
  return d_omega;
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("grape_phase_fwd", TORCH_BOX(&df::cuda::fwd));
  m.impl("grape_phase_bwd", TORCH_BOX(&df::cuda::bwd));
}
