// Host side of the gate: checks, the repeated constants, blocks of rows, registration.
#include <cmath>

#include "common/cpu/partial_sums.h"
#include "gated_delta/gate.h"
#include "gated_delta/host.h"

namespace df::cpu {
namespace {
constexpr int64_t kRowsABlock = 1024;  // of one partial sum; a multiple of GateArgs::kRepeat

// fn of the HV values of t (or of zeros), repeated, in the compute type of `like`.
template <class Fn>
Tensor repeated(const Tensor& like, const OptTensor& t, int64_t HV, Fn fn) {
  std::vector<double> values(HV, 0.0);
  if (t) {
    const Tensor wide = torch::stable::contiguous(torch::stable::to(*t, ScalarType::Double));
    std::memcpy(values.data(), wide.const_data_ptr(), HV * sizeof(double));
  }
  const Tensor all = empty(like, {GateArgs::kRepeat * HV}, compute_type(like));
  for (int64_t i = 0; i < all.numel(); ++i) {
    const double value = fn(values[i % HV]);
    if (all.scalar_type() == ScalarType::Double)
      static_cast<double*>(all.mutable_data_ptr())[i] = value;
    else
      static_cast<float*>(all.mutable_data_ptr())[i] = float(value);
  }
  return all;
}

// Keeps alive what GateArgs points to.
struct Inputs {
  Tensor a, rate, dt_bias;

  GateArgs args() const {
    return {dtype(a),
            a.numel(),
            rate.numel(),
            a.const_data_ptr(),
            nullptr,
            rate.const_data_ptr(),
            dt_bias.const_data_ptr(),
            nullptr,
            nullptr};
  }
};

Inputs gather(const Tensor& a, const Tensor& A_log, const OptTensor& dt_bias) {
  STD_TORCH_CHECK(a.dim() == 2 && A_log.dim() == 1 && A_log.size(0) == a.size(1),
                  "fused_gdn_gate: a must be [rows,HV] and A_log [HV]");
  const int64_t HV = a.size(1);
  return {torch::stable::contiguous(a),
          repeated(a, A_log, HV, [](double x) { return -std::exp(x); }),
          repeated(a, dt_bias, HV, [](double x) { return x; })};
}

Tensor fwd(const Tensor& a, const Tensor& A_log, const OptTensor& dt_bias) {
  const Inputs in = gather(a, A_log, dt_bias);
  const Tensor g = empty(a, {a.size(0), a.size(1)}, compute_type(a));
  GateArgs args = in.args();
  args.g = g.mutable_data_ptr();
  const int64_t blocks = (a.size(0) + kRowsABlock - 1) / kRowsABlock;
  const int64_t block = kRowsABlock * a.size(1);
  auto* kernel = DF_CPU(gdn_gate_fwd);
  parallel_for(0, blocks, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, block)),
               [&](int64_t begin, int64_t end) {
                 const FlushSubnormals flush;
                 kernel(args, begin * block, std::min(end * block, args.n));
               });
  return g;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& dg_, const Tensor& a, const Tensor& A_log,
                                       const OptTensor& dt_bias) {
  const Inputs in = gather(a, A_log, dt_bias);
  const int64_t HV = a.size(1);
  const Tensor dg = torch::stable::contiguous(torch::stable::to(dg_, compute_type(a)));
  const Tensor da = empty(a, {a.size(0), HV});
  GateArgs args = in.args();
  args.dg = dg.const_data_ptr();
  args.da = da.mutable_data_ptr();
  PartialSums sums(a, a.size(0), kRowsABlock, 2 * args.period);
  auto* kernel = DF_CPU(gdn_gate_bwd);
  sums.run([&](int64_t first, int64_t last, void* to, void*) {
    kernel(args, first * HV, last * HV, to);
  });
  // [2, kRepeat, HV]: the repetitions are rows of a sum, too
  Tensor all = sums.total();
  const auto half = [&](int64_t i) {
    const Tensor part = torch::stable::narrow(all, 0, i * args.period, args.period);
    return sum_blocks(torch::stable::view(part, {GateArgs::kRepeat, HV}), HV);
  };
  const Tensor dA_log = torch::stable::to(half(0), A_log.scalar_type());
  return {da, dA_log, dt_bias ? torch::stable::to(half(1), dt_bias->scalar_type()) : empty(a, {0})};
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("gdn_gate_fwd", TORCH_BOX(&df::cpu::fwd));
  m.impl("gdn_gate_bwd", TORCH_BOX(&df::cpu::bwd));
}
