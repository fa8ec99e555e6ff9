// Host side of the chunk form's forward on CUDA.
#include "gated_delta/chunk_cuda_host.h"
#include "gated_delta/chunk_fwd_host.h"

namespace df::cuda {
namespace {
std::tuple<Tensor, Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                                       const Tensor& g, const Tensor& beta,
                                       const OptTensor& initial_state, const OptTensor& cu_seqlens,
                                       const OptTensor& A_log, const OptTensor& dt_bias,
                                       double scale, bool l2norm, double sigmoid_scale,
                                       bool state_v_first, int64_t /*chunk_size*/,
                                       bool high_precision, int64_t split, bool batch_invariant,
                                       bool output_final_state, int64_t saving) {
  const ChunkTensors t = chunk_tensors(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias,
                                       scale, l2norm, sigmoid_scale, state_v_first);
  const ChunkCuda& in = t.args;
  const int64_t HV = in.shape.HV, K = in.shape.K, V = in.shape.V;
  const Tensor o = empty(q, {q.size(0), q.size(1), HV, V});
  const Tensor final_state = !output_final_state ? empty(q, {0}, ScalarType::Float)
                             : state_v_first     ? empty(q, {in.N, HV, V, K}, ScalarType::Float)
                                                 : empty(q, {in.N, HV, K, V}, ScalarType::Float);
  const int64_t kept = inverse_elements(in) + (saving == 2 ? state_elements(in) : 0);
  const Tensor saved = saving ? empty(q, {in.slots(), HV, kept}) : empty(q, {0});
  // the kernels of 16-bit inputs take T' from memory
  const bool inverse_needed = !saving && in.q.dtype != DType::f32;
  const Tensor inverse = empty(q, {inverse_needed ? in.slots() * HV * inverse_elements(in) : 0});
  ChunkFwdCuda p{in};
  p.initial_state = static_cast<const float*>(data(t.initial_state));
  p.o = o.mutable_data_ptr();
  if (output_final_state) p.final_state = static_cast<float*>(final_state.mutable_data_ptr());
  if (saving) {
    const Saved parts = saved_parts(in, saved.mutable_data_ptr(), saving);
    p.inverse = parts.inverse, p.states = parts.states;
  } else if (inverse_needed) {
    p.inverse = saved_parts(in, inverse.mutable_data_ptr(), 1).inverse;
  }
  p.high_precision = high_precision;
  const int64_t segment = segment_chunks(in, split, batch_invariant);
  const int64_t room = segment ? segment_slots(in, segment) * HV * segment_bytes(in) / 4 : 0;
  const Tensor segments = empty(q, {room}, ScalarType::Float);
  if (segment) p.segments = segment_room(in, segment, segments.mutable_data_ptr());
  Launch launch(t.q, t.k, t.v, t.g, t.beta, t.initial_state, t.cu_seqlens, t.A_log, t.dt_bias, o,
                final_state, saved, inverse, segments);
  if (in.N) chunk_fwd_run(p, launch.stream());
  if (cu_seqlens)
    chunk_zero_tail_cuda({in, {{p.o, HV * V * int64_t(o.element_size())}}}, launch.stream());
  launch.check();
  return {o, final_state, saved};
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("gated_delta_fwd", TORCH_BOX(&df::cuda::fwd));
}
