// Host side of the chunk form on the CPU: checks, allocation, tasks, registration.
#include <algorithm>

#include "gated_delta/chunk.h"
#include "gated_delta/host.h"

namespace df::cpu {
namespace {
constexpr int64_t kTileV = 64;

// Keeps alive what ChunkInputs points to.
struct Inputs {
  Tensor q, k, v, g, beta;
  OptTensor initial_state, A_log, dt_bias;
  std::vector<Sequence> sequences;
  int64_t covered;  // tokens of row 0 that belong to a sequence; the rest is padding

  ChunkInputs args(int64_t chunk_size, double scale, bool l2norm, double sigmoid_scale,
                   bool state_v_first) const {
    const ChunkShape shape{q.size(1), q.size(2), v.size(2), q.size(3), v.size(3), chunk_size};
    return {shape,
            input(q),
            input(k),
            input(v),
            input(g),
            input(beta),
            dense(initial_state),
            sequences.data(),
            {dense(A_log), dense(dt_bias), sigmoid_scale},
            scale,
            l2norm,
            state_v_first};
  }
  int64_t longest() const {
    int64_t most = 0;
    for (const Sequence& s : sequences) most = std::max(most, s.end - s.begin);
    return most;
  }
};

Inputs gather(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
              const Tensor& beta, const OptTensor& initial_state, const OptTensor& cu_seqlens,
              const OptTensor& A_log, const OptTensor& dt_bias, int64_t chunk_size) {
  STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "gated_delta: q, k, v must be 4-dimensional");
  STD_TORCH_CHECK(q.size(3) <= kMaxHeadDim && v.size(3) <= kMaxHeadDim,
                  "gated_delta: head dimensions above 256: K = ", q.size(3), ", V = ", v.size(3));
  STD_TORCH_CHECK(chunk_size >= 1 && chunk_size <= 64, "gated_delta: chunk_size = ", chunk_size);
  Inputs in{unit_last_stride(q),
            unit_last_stride(k),
            unit_last_stride(v),
            g,
            beta,
            readable_state(initial_state, q),
            contiguous(A_log),
            contiguous(dt_bias),
            sequences_of(q, cu_seqlens),
            0};
  in.covered = cu_seqlens ? (in.sequences.empty() ? 0 : in.sequences.back().end) : q.size(1);
  return in;
}

// Value heads a task: the whole group if that already feeds all threads, else single heads; value
// columns are cut, too, if heads do not suffice. Neither changes a bit of the result.
std::vector<ChunkTask> forward_tasks(const ChunkInputs& in, int64_t sequences, int64_t threads) {
  const ChunkShape& s = in.shape;
  const int64_t groups = sequences * s.H;
  const int64_t heads = groups >= 2 * threads || threads == 1 ? s.group() : 1;
  const int64_t tile = groups * (s.group() / heads) >= threads ? s.V : kTileV;
  std::vector<ChunkTask> tasks;
  for (int64_t n = 0; n < sequences; ++n)
    for (int64_t h = 0; h < s.HV; h += heads)
      for (int64_t v = 0; v < s.V; v += tile)
        tasks.push_back({n, h, h + heads, v, std::min(v + tile, s.V)});
  return tasks;
}

std::vector<ChunkTask> backward_tasks(const ChunkInputs& in, int64_t sequences) {
  const ChunkShape& s = in.shape;
  std::vector<ChunkTask> tasks;
  for (int64_t n = 0; n < sequences; ++n)
    for (int64_t h = 0; h < s.HV; h += s.group()) tasks.push_back({n, h, h + s.group(), 0, s.V});
  return tasks;
}

Tensor saved_by_forward(const Tensor& q, const ChunkInputs& in, int64_t sequences, bool packed) {
  const int64_t slots = saved_slots(in.shape, q.size(0), sequences, packed);
  return empty(q, {slots, in.shape.HV, SavedLayout(in.shape).elements()}, compute_type(q));
}

std::tuple<Tensor, Tensor, Tensor> fwd(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g, const Tensor& beta,
    const OptTensor& initial_state, const OptTensor& cu_seqlens, const OptTensor& A_log,
    const OptTensor& dt_bias, double scale, bool l2norm, double sigmoid_scale, bool state_v_first,
    int64_t chunk_size, bool /*high_precision*/, int64_t /*split*/, bool /*batch_invariant*/,
    bool output_final_state, int64_t saving) {
  const Inputs in = gather(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias, chunk_size);
  const int64_t n = int64_t(in.sequences.size()), HV = v.size(2), K = q.size(3), V = v.size(3);
  const Tensor o = empty(q, {q.size(0), q.size(1), HV, V});
  const ScalarType type = compute_type(q);
  const Tensor final_state = !output_final_state ? empty(q, {0}, type)
                             : state_v_first     ? empty(q, {n, HV, V, K}, type)
                                                 : empty(q, {n, HV, K, V}, type);
  zero_padding(o, in.covered);
  const ChunkInputs inputs = in.args(chunk_size, scale, l2norm, sigmoid_scale, state_v_first);
  const bool save = saving == 2;  // the inverses alone would not help here
  const Tensor saved =
      save ? saved_by_forward(q, inputs, n, cu_seqlens.has_value()) : empty(q, {0}, type);
  const ChunkFwdArgs args{
      inputs, o.mutable_data_ptr(), output_final_state ? final_state.mutable_data_ptr() : nullptr,
      save ? saved.mutable_data_ptr() : nullptr, streams(dtype(o), o.numel(), V)};
  int64_t bytes;
  DF_CPU(chunk_fwd_scratch)(args, &bytes);
  auto* kernel = DF_CPU(chunk_fwd);
  run_tasks(forward_tasks(args.in, n, torch::stable::get_num_threads()), in.sequences, bytes,
            5 * q.size(3),
            [&](const ChunkTask& task, void* scratch) { kernel(args, task, scratch); });
  return {o, final_state, saved};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients bwd(const Tensor& d_o_, const OptTensor& d_final_state_, const OptTensor& saved,
              const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
              const Tensor& beta, const OptTensor& initial_state, const OptTensor& cu_seqlens,
              const OptTensor& A_log, const OptTensor& dt_bias, double scale, bool l2norm,
              double sigmoid_scale, bool state_v_first, int64_t chunk_size, bool /*high_precision*/,
              int64_t /*split*/, bool /*batch_invariant*/) {
  const Inputs in = gather(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias, chunk_size);
  const Tensor d_o = unit_last_stride(d_o_);
  const OptTensor d_final_state = readable_state(d_final_state_, q);
  const int64_t n = int64_t(in.sequences.size()), HV = v.size(2), K = q.size(3), V = v.size(3);
  const int64_t B = q.size(0), T = q.size(1);
  const ScalarType type = compute_type(q);
  const Tensor dq = empty(q, {B, T, q.size(2), K}), dk = empty(q, {B, T, q.size(2), K});
  const Tensor dv = empty(q, {B, T, HV, V});
  const Tensor dg = empty(q, {B, T, HV}, type), dbeta = empty(q, {B, T, HV}, type);
  const Tensor dh0 = !initial_state  ? empty(q, {0}, type)
                     : state_v_first ? empty(q, {n, HV, V, K}, type)
                                     : empty(q, {n, HV, K, V}, type);
  for (const Tensor& t : {dq, dk, dv, dg, dbeta}) zero_padding(t, in.covered);
  std::vector<double> dA_log(A_log ? n * HV : 0), ddt_bias(dt_bias ? n * HV : 0);
  const ChunkInputs inputs = in.args(chunk_size, scale, l2norm, sigmoid_scale, state_v_first);
  STD_TORCH_CHECK(
      !saved || saved->numel() == saved_slots(inputs.shape, B, n, cu_seqlens.has_value()) * HV *
                                      SavedLayout(inputs.shape).elements(),
      "gated_delta: saved does not belong to these inputs");
  const ChunkBwdArgs args{inputs,
                          input(d_o),
                          dense(d_final_state),
                          saved ? saved->const_data_ptr() : nullptr,
                          dq.mutable_data_ptr(),
                          dk.mutable_data_ptr(),
                          dv.mutable_data_ptr(),
                          dg.mutable_data_ptr(),
                          dbeta.mutable_data_ptr(),
                          initial_state ? dh0.mutable_data_ptr() : nullptr,
                          A_log ? dA_log.data() : nullptr,
                          dt_bias ? ddt_bias.data() : nullptr,
                          streams(dtype(dq), dq.numel(), K),
                          streams(dtype(dv), dv.numel(), V)};
  int64_t bytes;
  const int64_t longest = in.longest();
  DF_CPU(chunk_bwd_scratch)(args, longest, &bytes);
  auto* kernel = DF_CPU(chunk_bwd);
  run_tasks(backward_tasks(args.in, n), in.sequences, bytes, 15 * q.size(3),
            [&](const ChunkTask& task, void* scratch) { kernel(args, longest, task, scratch); });
  const auto none = [&] { return empty(q, {0}, type); };  // outputs must not alias
  return {dq,
          dk,
          dv,
          torch::stable::to(dg, g.scalar_type()),
          torch::stable::to(dbeta, beta.scalar_type()),
          initial_state ? torch::stable::to(dh0, initial_state->scalar_type()) : dh0,
          A_log ? sum_over_sequences(dA_log, *A_log, HV) : none(),
          dt_bias ? sum_over_sequences(ddt_bias, *dt_bias, HV) : none()};
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("gated_delta_fwd", TORCH_BOX(&df::cpu::fwd));
  m.impl("gated_delta_bwd", TORCH_BOX(&df::cpu::bwd));
}
