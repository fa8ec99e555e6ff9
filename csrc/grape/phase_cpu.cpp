// Host side of the contextual phase on the CPU: sequences and blocks of phases side by side.
#include <algorithm>

#include "grape/phase_host.h"

namespace df::cpu {
namespace {
template <class Kernel>
void run(const PhaseArgs& p, Kernel* kernel) {
  if (p.cu_seqlens) {
    int64_t last = 0;
    for (int64_t n = 0; n < p.N; ++n) {
      const PhaseRow row = phase_row(p, n);
      STD_TORCH_CHECK(row.begin == last && row.end >= row.begin && row.end <= p.T,
                      "grape_phase: cu_seqlens[", n + 1, "] = ", row.end, " after ", last,
                      ", with ", p.T, " tokens");
      last = row.end;
    }
    STD_TORCH_CHECK(last == p.T, "grape_phase: cu_seqlens end at ", last, ", not at ", p.T);
  }
  const int64_t blocks = (p.M + kPhaseBlock - 1) / kPhaseBlock;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, p.T));
  parallel_for(0, p.N * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t m0 = i % blocks * kPhaseBlock;
      kernel(p, i / blocks, m0, std::min(m0 + kPhaseBlock, p.M));
    }
  });
}

std::tuple<Tensor, Tensor> fwd(const Tensor& omega, const OptTensor& cu_seqlens,
                               const OptTensor& initial) {
  const PhaseInputs in(omega, cu_seqlens, initial);
  const Tensor phi = in.made(), final = empty(omega, {in.N(), omega.size(2)}, ScalarType::Long);
  PhaseArgs p = in.args(phi);
  p.final = final.mutable_data_ptr<int64_t>();
  run(p, DF_CPU(phase_fwd));
  return {phi, final};
}

Tensor bwd(const Tensor& d_phi, const OptTensor& cu_seqlens) {
  const PhaseInputs in(d_phi, cu_seqlens, std::nullopt);
  const Tensor d_omega = in.made();
  run(in.args(d_omega), DF_CPU(phase_bwd));
  return d_omega;
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("grape_phase_fwd", TORCH_BOX(&df::cpu::fwd));
  m.impl("grape_phase_bwd", TORCH_BOX(&df::cpu::bwd));
}
