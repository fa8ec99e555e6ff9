#include "common/cuda_shim.h"
#include "gated_delta/decode_host.h"

namespace df::cuda {
static void decode(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                   const Tensor& A_log, const Tensor& a, const OptTensor& dt_bias, const Tensor& b,
                   double scale, const Tensor& output, bool l2norm, const OptTensor& read,
                   const OptTensor& write, bool v_first, const OptTensor& snapshots) {
  const DecodeTensors t = decode_tensors(q, k, v, state, A_log, a, dt_bias, b, scale, output,
                                         l2norm, read, write, v_first, snapshots);
  STD_TORCH_CHECK(t.args.K <= 256, "gated_delta_decode: K must be at most 256 on CUDA");
  if (t.args.B == 0 || t.args.HV == 0 || t.args.V == 0) return;
  STD_TORCH_CHECK(t.args.H <= 65535 && t.args.HV / t.args.H <= 65535,
                  "gated_delta_decode: at most 65535 heads, and as many a group, on CUDA");
  Launch launch(t.q, t.k, t.v, t.state, t.A_log, t.a, t.dt_bias, t.b, t.output, t.read, t.write,
                t.snapshots);
  switch (t.args.state_type) {
    case DType::f32: decode_f32_cuda(t.args, launch.stream()); break;
    case DType::bf16: decode_bf16_cuda(t.args, launch.stream()); break;
    case DType::f16: decode_f16_cuda(t.args, launch.stream()); break;
    case DType::f64: STD_TORCH_CHECK(false, "gated_delta_decode: no float64 states on CUDA");
  }
  launch.check();
}
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("gated_delta_decode", TORCH_BOX(&df::cuda::decode));
}
