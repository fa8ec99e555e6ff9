// Host side of the row norms on CUDA: checks, alignment, allocation, registration. x is [rows, V].
#include "common/cuda_shim.h"
#include "common/sequences_host.h"
#include "gated_delta/gated_norm.h"

namespace df::cuda {
namespace {
Rows rows(const Tensor& t) {
  return {t.const_data_ptr(), t.stride(0)};
}

// Whether every row of all that a launch touches is made of whole 16-byte pieces.
bool whole_pieces(const RowNormArgs& p) {
  const int64_t piece = p.dtype == DType::f32 ? 4 : 8;
  const auto aligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; };
  bool whole = p.V % piece == 0 && aligned(p.weight) && aligned(p.y) && aligned(p.dgate);
  for (const Rows& x : {p.x, p.gate, p.dy})
    whole = whole && aligned(x.data) && x.stride % piece == 0;
  return whole;
}

RowNormLaunch row_norm(const Tensor& x, double eps, bool mean, const Tensor& y) {
  RowNormLaunch launch{};
  launch.args.dtype = dtype(x), launch.args.V = x.size(1), launch.args.eps = eps;
  launch.args.x = rows(x), launch.args.y = y.mutable_data_ptr();
  launch.rows = x.size(0), launch.weight_type = DType::f32, launch.mean = mean;
  return launch;
}

struct GatedNorm {  // owns the copies where there were none
  Tensor x, weight;
  OptTensor gate;
  RowNormLaunch launch(double eps, const Tensor& y) const {
    RowNormLaunch launch = row_norm(x, eps, true, y);
    if (gate) launch.args.gate = rows(*gate);
    launch.args.weight = weight.const_data_ptr(), launch.weight_type = dtype(weight);
    return launch;
  }
};
GatedNorm gather(const Tensor& x, const Tensor& weight, const OptTensor& gate) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 1 && weight.size(0) == x.size(1),
                  "gated_rms_norm: x must be [rows,V] and weight [V]");
  STD_TORCH_CHECK(!gate || (gate->dim() == 2 && gate->size(0) == x.size(0) &&
                            gate->size(1) == x.size(1) && gate->scalar_type() == x.scalar_type()),
                  "gated_rms_norm: gate must have the shape and dtype of x");
  return {unit_last_stride(x), contiguous(weight),
          gate ? OptTensor(unit_last_stride(*gate)) : gate};
}

auto* forward_of(const Tensor& x) {
  return by_type(dtype(x), &row_norm_fwd_f32_cuda, &row_norm_fwd_bf16_cuda, &row_norm_fwd_f16_cuda);
}
auto* backward_of(const Tensor& x) {
  return by_type(dtype(x), &row_norm_bwd_f32_cuda, &row_norm_bwd_bf16_cuda, &row_norm_bwd_f16_cuda);
}

Tensor fwd(const Tensor& x, const Tensor& weight, const OptTensor& gate, double eps) {
  const GatedNorm in = gather(x, weight, gate);
  const Tensor y = empty(x, {x.size(0), x.size(1)});
  RowNormLaunch norm = in.launch(eps, y);
  norm.vectors = whole_pieces(norm.args);
  Launch launch(in.x, in.weight, in.gate, y);
  forward_of(x)(norm, launch.stream());
  launch.check();
  return y;
}

std::tuple<Tensor, Tensor, Tensor> bwd(const Tensor& dy_, const Tensor& x, const Tensor& weight,
                                       const OptTensor& gate, double eps) {
  const GatedNorm in = gather(x, weight, gate);
  const Tensor dy = unit_last_stride(torch::stable::to(dy_, x.scalar_type()));
  const int64_t count = x.size(0), V = x.size(1);
  const Tensor dx = empty(x, {count, V}), dgate = gate ? empty(x, {count, V}) : empty(x, {0});
  const Tensor dweight = empty(weight, {V});
  RowNormLaunch norm = in.launch(eps, dx);
  norm.args.dy = rows(dy), norm.args.dgate = gate ? dgate.mutable_data_ptr() : nullptr;
  norm.vectors = whole_pieces(norm.args);
  const Tensor partial = empty(x, {norm.partial_rows(), V}, ScalarType::Float);
  norm.partial = static_cast<float*>(partial.mutable_data_ptr());
  Launch launch(in.x, in.weight, in.gate, dy, dx, dgate, dweight, partial);
  backward_of(x)(norm, dweight.mutable_data_ptr(), launch.stream());
  launch.check();
  return {dx, dweight, dgate};
}

Tensor l2norm(const Tensor& x_, double eps) {
  const Tensor x = unit_last_stride(x_), y = empty(x, {x.size(0), x.size(1)});
  RowNormLaunch norm = row_norm(x, eps, false, y);
  norm.vectors = whole_pieces(norm.args);
  Launch launch(x, y);
  forward_of(x)(norm, launch.stream());
  launch.check();
  return y;
}

Tensor l2norm_gradient(const Tensor& dy_, const Tensor& x_, double eps) {
  const Tensor x = unit_last_stride(x_), dx = empty(x, {x.size(0), x.size(1)});
  const Tensor dy = unit_last_stride(torch::stable::to(dy_, x.scalar_type()));
  RowNormLaunch norm = row_norm(x, eps, false, dx);
  norm.args.dy = rows(dy);
  norm.vectors = whole_pieces(norm.args);
  Launch launch(x, dy, dx);
  backward_of(x)(norm, nullptr, launch.stream());
  launch.check();
  return dx;
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("gated_rms_norm_fwd", TORCH_BOX(&df::cuda::fwd));
  m.impl("gated_rms_norm_bwd", TORCH_BOX(&df::cuda::bwd));
  m.impl("l2norm_fwd", TORCH_BOX(&df::cuda::l2norm));
  m.impl("l2norm_bwd", TORCH_BOX(&df::cuda::l2norm_gradient));
}
