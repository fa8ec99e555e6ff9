// Host side of the chunk form on the CPU: checks, allocation, tasks, registration.
#include <algorithm>
#include <atomic>
#include <memory>

#include "gated_delta/chunk.h"
#include "gated_delta/input_host.h"

namespace df::cpu {
namespace {
constexpr int64_t kMaxHeadDim = 256, kTileV = 64;

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

std::vector<Sequence> sequences_of(const Tensor& q, const OptTensor& cu_seqlens) {
  std::vector<Sequence> all;
  if (!cu_seqlens) {
    for (int64_t b = 0; b < q.size(0); ++b) all.push_back({b, 0, q.size(1)});
    return all;
  }
  const Tensor offsets = torch::stable::contiguous(*cu_seqlens);
  const bool wide = offsets.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || offsets.scalar_type() == ScalarType::Int,
                  "gated_delta: cu_seqlens must be int32 or int64");
  const auto at = [&](int64_t i) {
    return wide ? static_cast<const int64_t*>(offsets.const_data_ptr())[i]
                : int64_t(static_cast<const int32_t*>(offsets.const_data_ptr())[i]);
  };
  STD_TORCH_CHECK(offsets.numel() > 0 && at(0) == 0, "gated_delta: cu_seqlens must start with 0");
  for (int64_t i = 1; i < offsets.numel(); ++i) {
    STD_TORCH_CHECK(at(i - 1) <= at(i) && at(i) <= q.size(1), "gated_delta: cu_seqlens[", i,
                    "] = ", at(i), " after ", at(i - 1), ", with ", q.size(1), " tokens");
    all.push_back({0, at(i - 1), at(i)});
  }
  return all;
}

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
            contiguous(initial_state),
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

// Workers draw tasks, longest sequence first; each has a zeroed scratch of its own.
template <class Run>
void run_tasks(std::vector<ChunkTask> tasks, const std::vector<Sequence>& sequences, int64_t bytes,
               Run run) {
  const auto length = [&](const ChunkTask& t) {
    return sequences[t.sequence].end - sequences[t.sequence].begin;
  };
  std::stable_sort(tasks.begin(), tasks.end(), [&](const ChunkTask& a, const ChunkTask& b) {
    return length(a) > length(b);
  });
  const int64_t count = int64_t(tasks.size());
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), count);
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      std::unique_ptr<void, decltype(&std::free)> block(std::calloc(bytes + 64, 1), &std::free);
      STD_TORCH_CHECK(block, "gated_delta: no memory for ", bytes, " bytes of scratch");
      void* scratch = reinterpret_cast<void*>((uintptr_t(block.get()) + 63) & ~uintptr_t(63));
      for (int64_t i; (i = next.fetch_add(1)) < count;) run(tasks[i], scratch);
    }
  });
}

// Zeroes the tokens behind the last sequence of a contiguous [1,T,...].
void zero_padding(const Tensor& t, int64_t covered) {
  if (covered == t.size(1) || t.numel() == 0) return;
  const int64_t row = t.numel() / t.size(1) * int64_t(t.element_size());
  std::memset(static_cast<char*>(t.mutable_data_ptr()) + covered * row, 0,
              (t.size(1) - covered) * row);
}

std::tuple<Tensor, Tensor> fwd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
                               const Tensor& beta, const OptTensor& initial_state,
                               const OptTensor& cu_seqlens, const OptTensor& A_log,
                               const OptTensor& dt_bias, double scale, bool l2norm,
                               double sigmoid_scale, bool state_v_first, int64_t chunk_size,
                               bool output_final_state) {
  const Inputs in =
      gather(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias, chunk_size);
  const int64_t n = int64_t(in.sequences.size()), HV = v.size(2), K = q.size(3), V = v.size(3);
  const Tensor o = empty(q, {q.size(0), q.size(1), HV, V});
  const ScalarType type = compute_type(q);
  const Tensor final_state = !output_final_state ? empty(q, {0}, type)
                             : state_v_first     ? empty(q, {n, HV, V, K}, type)
                                                 : empty(q, {n, HV, K, V}, type);
  zero_padding(o, in.covered);
  const ChunkFwdArgs args{in.args(chunk_size, scale, l2norm, sigmoid_scale, state_v_first),
                          o.mutable_data_ptr(),
                          output_final_state ? final_state.mutable_data_ptr() : nullptr};
  int64_t bytes;
  DF_CPU(chunk_fwd_scratch)(args, &bytes);
  auto* kernel = DF_CPU(chunk_fwd);
  run_tasks(forward_tasks(args.in, n, torch::stable::get_num_threads()), in.sequences, bytes,
            [&](const ChunkTask& task, void* scratch) { kernel(args, task, scratch); });
  return {o, final_state};
}

// [HV] from one partial sum a sequence, in their order.
Tensor sum_over_sequences(const std::vector<double>& partial, const Tensor& like, int64_t HV) {
  const Tensor total = empty(like, {HV}, ScalarType::Double);
  double* to = static_cast<double*>(total.mutable_data_ptr());
  std::fill(to, to + HV, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) to[i % HV] += partial[i];
  return torch::stable::to(total, like.scalar_type());
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients bwd(const Tensor& d_o_, const OptTensor& d_final_state_, const Tensor& q, const Tensor& k,
              const Tensor& v, const Tensor& g, const Tensor& beta, const OptTensor& initial_state,
              const OptTensor& cu_seqlens, const OptTensor& A_log, const OptTensor& dt_bias,
              double scale, bool l2norm, double sigmoid_scale, bool state_v_first,
              int64_t chunk_size) {
  const Inputs in =
      gather(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias, chunk_size);
  const Tensor d_o = unit_last_stride(d_o_);
  const OptTensor d_final_state = contiguous(d_final_state_);
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
  const ChunkBwdArgs args{in.args(chunk_size, scale, l2norm, sigmoid_scale, state_v_first),
                          input(d_o),
                          dense(d_final_state),
                          dq.mutable_data_ptr(),
                          dk.mutable_data_ptr(),
                          dv.mutable_data_ptr(),
                          dg.mutable_data_ptr(),
                          dbeta.mutable_data_ptr(),
                          initial_state ? dh0.mutable_data_ptr() : nullptr,
                          A_log ? dA_log.data() : nullptr,
                          dt_bias ? ddt_bias.data() : nullptr};
  int64_t bytes;
  const int64_t longest = in.longest();
  DF_CPU(chunk_bwd_scratch)(args, longest, &bytes);
  auto* kernel = DF_CPU(chunk_bwd);
  run_tasks(backward_tasks(args.in, n), in.sequences, bytes,
            [&](const ChunkTask& task, void* scratch) { kernel(args, longest, task, scratch); });
  const Tensor none = empty(q, {0}, type);
  return {dq,
          dk,
          dv,
          torch::stable::to(dg, g.scalar_type()),
          torch::stable::to(dbeta, beta.scalar_type()),
          initial_state ? torch::stable::to(dh0, initial_state->scalar_type()) : dh0,
          A_log ? sum_over_sequences(dA_log, *A_log, HV) : none,
          dt_bias ? sum_over_sequences(ddt_bias, *dt_bias, HV) : none};
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("gated_delta_fwd", TORCH_BOX(&df::cpu::fwd));
  m.impl("gated_delta_bwd", TORCH_BOX(&df::cpu::bwd));
}
