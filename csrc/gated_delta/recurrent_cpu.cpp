// Host side of the per-token form on the CPU: checks, allocation, tasks, registration.
#include "gated_delta/host.h"
#include "gated_delta/recurrent.h"

namespace df::cpu {
namespace {
constexpr int64_t kCheckpoint = 64;       // tokens between two states that the backward keeps
constexpr int64_t kTileBytes = 32 << 10;  // of the state, in the first-level cache

// Keeps alive what RecurrentInputs points to.
struct Inputs {
  Tensor q, k, v;
  OptTensor g, gk, gv, beta, initial_state, A_log, dt_bias;
  std::vector<Sequence> sequences;
  int64_t covered;  // tokens of row 0 that belong to a sequence; the rest is padding

  RecurrentInputs args(double scale, bool l2norm, double sigmoid_scale, bool state_v_first) const {
    const auto in = [](const OptTensor& t) { return t ? input(*t) : Input{}; };
    const ChunkShape shape{q.size(1), q.size(2), v.size(2), q.size(3), v.size(3), kCheckpoint};
    return {{shape,
             input(q),
             input(k),
             input(v),
             in(g),
             in(beta),
             dense(initial_state),
             sequences.data(),
             {dense(A_log), dense(dt_bias), sigmoid_scale},
             scale,
             l2norm,
             state_v_first},
            in(gk),
            in(gv),
            beta && beta->dim() == 4};
  }
};

OptTensor rows(const OptTensor& t, const Tensor& q) {
  return t ? OptTensor(unit_last_stride(readable(*t, q))) : t;
}

Inputs gather(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& g,
              const OptTensor& gk, const OptTensor& gv, const OptTensor& beta,
              const OptTensor& initial_state, const OptTensor& cu_seqlens, const OptTensor& A_log,
              const OptTensor& dt_bias) {
  STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "gated_delta: q, k, v must be 4-dimensional");
  STD_TORCH_CHECK(q.size(3) <= kMaxHeadDim && v.size(3) <= kMaxHeadDim,
                  "gated_delta: head dimensions above 256: K = ", q.size(3), ", V = ", v.size(3));
  Inputs in{unit_last_stride(q),
            unit_last_stride(k),
            unit_last_stride(v),
            g,
            rows(gk, q),
            rows(gv, q),
            beta && beta->dim() == 4 ? rows(beta, q) : beta,
            readable_state(initial_state, q),
            contiguous(A_log),
            contiguous(dt_bias),
            sequences_of(q, cu_seqlens),
            0};
  in.covered = cu_seqlens ? (in.sequences.empty() ? 0 : in.sequences.back().end) : q.size(1);
  return in;
}

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

Tensor empty_states(const Tensor& q, bool wanted, int64_t n, const ChunkShape& s, bool v_first) {
  const ScalarType type = compute_type(q);
  if (!wanted) return empty(q, {0}, type);
  return v_first ? empty(q, {n, s.HV, s.V, s.K}, type) : empty(q, {n, s.HV, s.K, s.V}, type);
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptTensor& g, const OptTensor& gk, const OptTensor& gv,
                               const OptTensor& beta, const OptTensor& initial_state,
                               const OptTensor& cu_seqlens, const OptTensor& A_log,
                               const OptTensor& dt_bias, double scale, bool l2norm,
                               double sigmoid_scale, bool state_v_first, bool output_final_state) {
  const Inputs in = gather(q, k, v, g, gk, gv, beta, initial_state, cu_seqlens, A_log, dt_bias);
  RecurrentFwdArgs args{in.args(scale, l2norm, sigmoid_scale, state_v_first), nullptr, nullptr};
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

Tensor empty_as(const OptTensor& t, const Tensor& q) {  // in the compute type, contiguous
  const ScalarType type = compute_type(q);
  if (!t) return empty(q, {0}, type);
  return t->dim() == 4 ? empty(q, {t->size(0), t->size(1), t->size(2), t->size(3)}, type)
                       : empty(q, {t->size(0), t->size(1), t->size(2)}, type);
}

Tensor like(const Tensor& gradient, const OptTensor& t) {
  return t ? torch::stable::to(gradient, t->scalar_type()) : gradient;
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients bwd(const Tensor& d_o_, const OptTensor& d_final_state_, const Tensor& q, const Tensor& k,
              const Tensor& v, const OptTensor& g, const OptTensor& beta,
              const OptTensor& initial_state, const OptTensor& cu_seqlens, const OptTensor& A_log,
              const OptTensor& dt_bias, double scale, bool l2norm, double sigmoid_scale,
              bool state_v_first) {
  const OptTensor none;
  const Inputs in = gather(q, k, v, g, none, none, beta, initial_state, cu_seqlens, A_log, dt_bias);
  const Tensor d_o = unit_last_stride(d_o_);
  const OptTensor d_final_state = readable_state(d_final_state_, q);
  RecurrentBwdArgs args{in.args(scale, l2norm, sigmoid_scale, state_v_first), input(d_o),
                        dense(d_final_state)};
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
