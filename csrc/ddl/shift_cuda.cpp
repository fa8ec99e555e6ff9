#include "common/cuda_shim.h"
#include "ddl/shift_host.h"

namespace df::cuda {
namespace {
void check_type(const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() != ScalarType::Double, "token_shift: no float64 kernel on CUDA");
}

std::tuple<Tensor, Tensor> fwd(const Tensor& x, const Tensor& previous, const Tensor& current,
                               const OptTensor& cache, const OptTensor& cu_seqlens,
                               bool output_cache) {
  check_type(x);
  const ShiftTensors in = shift_tensors(x, previous, current, cache, cu_seqlens);
  const auto [B, T, N, H, D] = in.shape;
  const Tensor y = empty(x, {B, T, H, D});
  const Tensor last = output_cache ? in.state(x.scalar_type()) : empty(x, {0});
  Launch launch(in.x, in.previous, in.current, in.cache, in.cu_seqlens, y, last);
  shift_fwd_cuda(in.fwd(y, output_cache ? &last : nullptr), device_offsets(in.cu_seqlens, N, T),
                 launch.stream());
  launch.check();
  return {y, last};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bwd(const Tensor& dy, const OptTensor& d_last,
                                               const Tensor& x, const Tensor& previous,
                                               const Tensor& current, const OptTensor& cache,
                                               const OptTensor& cu_seqlens) {
  check_type(x);
  const ShiftTensors in = shift_tensors(x, previous, current, cache, cu_seqlens);
  const ShiftGrads grads = shift_grads(in, dy, d_last);
  Launch launch(in.x, in.previous, in.current, in.cache, in.cu_seqlens, grads.dy, grads.d_last,
                grads.dx, grads.d_cache, grads.d_previous, grads.d_current);
  shift_bwd_cuda(grads.args(in), device_offsets(in.cu_seqlens, in.shape.N, in.shape.T),
                 launch.stream());
  launch.check();
  return shift_results(grads, previous, current, cache);
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("token_shift_fwd", TORCH_BOX(&df::cuda::fwd));
  m.impl("token_shift_bwd", TORCH_BOX(&df::cuda::bwd));
}
