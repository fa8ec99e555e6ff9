// Host side of the per-token form on the CPU: checks, allocation, tasks, registration.
#include "gated_delta/host.h"
#include "gated_delta/recurrent_host.h"

namespace df::cpu {
namespace {
constexpr int64_t kTileBytes = 32 << 10;  // of the state, in the first-level cache

struct Inputs : RecurrentTensors {
  std::vector<Sequence> sequences;
  int64_t covered;  // tokens of row 0 that belong to a sequence; the rest is padding

  Inputs(const RecurrentTensors& tensors, const OptTensor& cu_seqlens)
      : RecurrentTensors(tensors), sequences(sequences_of(q, cu_seqlens)) {
    covered = cu_seqlens ? (sequences.empty() ? 0 : sequences.back().end) : q.size(1);
  }
};

// A tile is a power of two of columns, whatever the number of threads.
std::vector<ChunkTask> forward_tasks(const ChunkShape& s, int64_t sequences, int64_t element) {
  int64_t tile = 16;
  while (tile < s.V && 2 * tile * s.K * element <= kTileBytes) tile *= 2;
  std::vector<ChunkTask> tasks;
  for (int64_t n = 0; n < sequences; ++n)
    for (int64_t h = 0; h < s.HV; ++h)
      for (int64_t v = 0; v < s.V; v += tile)
        tasks.push_back({n, h, h + 1, v, std::min(v + tile, s.V)});
  return tasks;
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptTensor& g, const OptTensor& gk, const OptTensor& gv,
                               const OptTensor& beta, const OptTensor& initial_state,
                               const OptTensor& cu_seqlens, const OptTensor& A_log,
                               const OptTensor& dt_bias, double scale, bool l2norm,
                               double sigmoid_scale, bool state_v_first, bool output_final_state) {
  const Inputs in(recurrent_tensors(q, k, v, g, gk, gv, beta, initial_state, A_log, dt_bias),
                  cu_seqlens);
  RecurrentFwdArgs args{in.args(scale, l2norm, sigmoid_scale, state_v_first, in.sequences.data()),
                        nullptr, nullptr};
  const ChunkShape& s = args.x.in.shape;
  const int64_t n = int64_t(in.sequences.size());
  const Tensor o = empty(q, {q.size(0), s.T, s.HV, s.V});
  const Tensor final_state = empty_states(q, output_final_state, n, s, state_v_first);
  zero_padding(o, in.covered);
  args.o = o.mutable_data_ptr();
  args.final_state = output_final_state ? final_state.mutable_data_ptr() : nullptr;
  int64_t bytes;
  DF_CPU(recurrent_fwd_scratch)(args, &bytes);
  auto* kernel = DF_CPU(recurrent_fwd);
  const int64_t element = compute_type(q) == ScalarType::Double ? 8 : 4;
  run_tasks(forward_tasks(s, n, element), in.sequences, bytes, 3 * s.K,
            [&](const ChunkTask& task, void* scratch) { kernel(args, task, scratch); });
  return {o, final_state};
}

std::vector<ChunkTask> backward_tasks(const ChunkShape& s, int64_t sequences) {
  std::vector<ChunkTask> tasks;
  for (int64_t n = 0; n < sequences; ++n)
    for (int64_t h = 0; h < s.HV; h += s.group()) tasks.push_back({n, h, h + s.group(), 0, s.V});
  return tasks;
}

RecurrentGradients bwd(const Tensor& d_o_, const OptTensor& d_final_state_, const Tensor& q,
                       const Tensor& k, const Tensor& v, const OptTensor& g, const OptTensor& beta,
                       const OptTensor& initial_state, const OptTensor& cu_seqlens,
                       const OptTensor& A_log, const OptTensor& dt_bias, double scale, bool l2norm,
                       double sigmoid_scale, bool state_v_first) {
  const OptTensor none;
  const Inputs in(recurrent_tensors(q, k, v, g, none, none, beta, initial_state, A_log, dt_bias),
                  cu_seqlens);
  const Tensor d_o = unit_last_stride(d_o_);
  const OptTensor d_final_state = readable_state(d_final_state_, q);
  RecurrentBwdArgs args{in.args(scale, l2norm, sigmoid_scale, state_v_first, in.sequences.data()),
                        input(d_o), dense(d_final_state)};
  const ChunkShape& s = args.x.in.shape;
  const int64_t n = int64_t(in.sequences.size());
  const Tensor dq = empty(q, {q.size(0), s.T, s.H, s.K}), dk = empty(q, {q.size(0), s.T, s.H, s.K});
  const Tensor dv = empty(q, {q.size(0), s.T, s.HV, s.V});
  const Tensor dg = empty_as(g, q), dbeta = empty_as(beta, q);
  const Tensor dh0 = empty_states(q, initial_state.has_value(), n, s, state_v_first);
  zero_padding(dq, in.covered), zero_padding(dk, in.covered), zero_padding(dv, in.covered);
  if (g) zero_padding(dg, in.covered);
  if (beta) zero_padding(dbeta, in.covered);
  std::vector<double> dA_log(A_log ? n * s.HV : 0), ddt_bias(dt_bias ? n * s.HV : 0);
  args.dq = dq.mutable_data_ptr(), args.dk = dk.mutable_data_ptr();
  args.dv = dv.mutable_data_ptr();
  args.dg = g ? dg.mutable_data_ptr() : nullptr;
  args.dbeta = beta ? dbeta.mutable_data_ptr() : nullptr;
  args.d_initial_state = initial_state ? dh0.mutable_data_ptr() : nullptr;
  args.dA_log = A_log ? dA_log.data() : nullptr;
  args.ddt_bias = dt_bias ? ddt_bias.data() : nullptr;
  int64_t bytes, longest = 0;
  for (const Sequence& x : in.sequences) longest = std::max(longest, x.end - x.begin);
  DF_CPU(recurrent_bwd_scratch)(args, longest, &bytes);
  auto* kernel = DF_CPU(recurrent_bwd);
  run_tasks(backward_tasks(s, n), in.sequences, bytes, 14 * s.K,
            [&](const ChunkTask& task, void* scratch) { kernel(args, longest, task, scratch); });
  return {dq,
          dk,
          dv,
          like(dg, g),
          like(dbeta, beta),
          like(dh0, initial_state),
          A_log ? sum_over_sequences(dA_log, *A_log, s.HV) : empty_as(none, q),
          dt_bias ? sum_over_sequences(ddt_bias, *dt_bias, s.HV) : empty_as(none, q)};
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("gated_delta_recurrent_fwd", TORCH_BOX(&df::cpu::fwd));
  m.impl("gated_delta_recurrent_bwd", TORCH_BOX(&df::cpu::bwd));
}
