// Host side of the row norms: checks, allocation, blocks of rows, registration. x is [rows, V].
#include "common/cpu/partial_sums.h"
#include "gated_delta/gated_norm.h"
#include "gated_delta/host.h"

namespace df::cpu {
namespace {
constexpr int64_t kBlock = 256;  // rows of one partial sum of dweight

Rows rows(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0)};
}
int64_t grain(int64_t V) {  // a thread takes at least some 16 k elements
  return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, V));
}

// Keeps alive what RowNormArgs points to.
struct Inputs {
  Tensor x, weight;
  OptTensor gate;

  RowNormArgs args(double eps, const Tensor& y) const {
    return {dtype(x),
            x.size(1),
            eps,
            rows(x),
            gate ? rows(*gate) : Rows{},
            {},
            weight.const_data_ptr(),
            y.mutable_data_ptr(),
            nullptr};
  }
};

Inputs gather(const Tensor& x, const Tensor& weight, const OptTensor& gate) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 1 && weight.size(0) == x.size(1),
                  "gated_rms_norm: x must be [rows,V] and weight [V]");
  STD_TORCH_CHECK(!gate || (gate->dim() == 2 && gate->size(0) == x.size(0) &&
                            gate->size(1) == x.size(1) && gate->scalar_type() == x.scalar_type()),
                  "gated_rms_norm: gate must have the shape and dtype of x");
  return {unit_last_stride(x), contiguous(torch::stable::to(weight, compute_type(x))),
          gate ? OptTensor(unit_last_stride(*gate)) : gate};
}

Tensor fwd(const Tensor& x, const Tensor& weight, const OptTensor& gate, double eps) {
  const Inputs in = gather(x, weight, gate);
  const Tensor y = empty(x, {x.size(0), x.size(1)});
  const RowNormArgs args = in.args(eps, y);
  auto* kernel = DF_CPU(gated_norm_fwd);
  parallel_for(0, x.size(0), grain(args.V), [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    kernel(args, begin, end);
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& dy_, const Tensor& x, const Tensor& weight,
                                       const OptTensor& gate, double eps) {
  const Inputs in = gather(x, weight, gate);
  const Tensor dy = unit_last_stride(dy_);
  const int64_t count = x.size(0), V = x.size(1);
  const Tensor dx = empty(x, {count, V}), dgate = gate ? empty(x, {count, V}) : empty(x, {0});
  RowNormArgs args = in.args(eps, dx);
  args.dy = rows(dy);
  args.dgate = dgate.mutable_data_ptr();
  PartialSums sums(x, count, kBlock, V);
  auto* kernel = DF_CPU(gated_norm_bwd);
  sums.run([&](int64_t first, int64_t last, void* to, void* scratch) {
    kernel(args, first, last, to, scratch);
  });
  return {dx, torch::stable::to(sums.total(), weight.scalar_type()), dgate};
}

Tensor l2norm(const Tensor& x_, double eps) {
  const Tensor x = unit_last_stride(x_), y = empty(x, {x.size(0), x.size(1)});
  const RowNormArgs args{dtype(x), x.size(1), eps, rows(x), {}, {}, nullptr, y.mutable_data_ptr(),
                         nullptr};
  auto* kernel = DF_CPU(l2norm_fwd);
  parallel_for(0, x.size(0), grain(args.V), [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    kernel(args, begin, end);
  });
  return y;
}

Tensor l2norm_gradient(const Tensor& dy_, const Tensor& x_, double eps) {
  const Tensor x = unit_last_stride(x_), dy = unit_last_stride(dy_);
  const Tensor dx = empty(x, {x.size(0), x.size(1)});
  const RowNormArgs args{
      dtype(x), x.size(1), eps, rows(x), {}, rows(dy), nullptr, dx.mutable_data_ptr(), nullptr};
  auto* kernel = DF_CPU(l2norm_bwd);
  parallel_for(0, x.size(0), grain(args.V), [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    kernel(args, begin, end);
  });
  return dx;
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("gated_rms_norm_fwd", TORCH_BOX(&df::cpu::fwd));
  m.impl("gated_rms_norm_bwd", TORCH_BOX(&df::cpu::bwd));
  m.impl("l2norm_fwd", TORCH_BOX(&df::cpu::l2norm));
  m.impl("l2norm_bwd", TORCH_BOX(&df::cpu::l2norm_gradient));
}
