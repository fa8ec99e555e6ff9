// Host side of the chunk form's backward on CUDA.
#include "gated_delta/chunk_bwd_cuda.h"

#include <algorithm>

#include "gated_delta/chunk_cuda_host.h"
#include "gated_delta/chunk_fwd_host.h"

namespace df::cuda {
namespace {
using Kernel = int (*)(const ChunkBwdCuda&, void* stream);

// The kernel for the inputs' type; wgmma where the device has it and `can_sm90`.
Kernel choose(DType dtype, bool can_sm90, Kernel f32, Kernel bf16, Kernel f16, Kernel bf16_sm90,
              Kernel f16_sm90) {
  if (dtype == DType::f32) return f32;
  const bool is_bf16 = dtype == DType::bf16;
  const Kernel sm90 = is_bf16 ? bf16_sm90 : f16_sm90;
  return sm90 && can_sm90 && sm() == 90 ? sm90 : is_bf16 ? bf16 : f16;
}

void run(const ChunkBwdCuda& p, void* stream) {
  const ChunkCuda& in = p.in;
  const DType dtype = in.q.dtype;
  const bool tma = tma_loads(tma_keys(in, in.q)) && tma_loads(tma_keys(in, in.k)) &&
                   tma_loads(tma_values(in, p.d_o));
  const Kernel states =
      choose(dtype, tma, chunk_bwd_states_f32, chunk_bwd_states_bf16, chunk_bwd_states_f16,
             chunk_bwd_states_bf16_sm90, chunk_bwd_states_f16_sm90);
  if (in.N && p.segments.chunks) {
    ChunkBwdCuda first = p;
    first.summary = true;
    check_launch(states(first, stream));
    chunk_scan_cuda({in, p.segments, true}, stream);
  }
  if (in.N) check_launch(states(p, stream));
  if (in.slots())
    check_launch(choose(dtype, true, chunk_bwd_chunks_f32, chunk_bwd_chunks_bf16,
                        chunk_bwd_chunks_f16, chunk_bwd_chunks_bf16_sm90,
                        chunk_bwd_chunks_f16_sm90)(p, stream));
  if (p.dA_log) chunk_bwd_sums(p, stream);
}

// What the backward needs from the forward, by slot and head: `saved`, or made again.
struct FromForward {
  Tensor inverses, states;
  Saved parts;
};
FromForward from_forward(const ChunkTensors& t, const OptTensor& saved, bool high_precision,
                         const Segments& segments, const Tensor& room) {
  const ChunkCuda& in = t.args;
  const int64_t rows = in.slots() * in.shape.HV, inverse = inverse_elements(in);
  const int64_t state = state_elements(in), kept = saved && rows ? saved->numel() / rows : 0;
  STD_TORCH_CHECK(!saved || (saved->numel() == rows * kept &&
                             (rows == 0 || kept == inverse || kept == inverse + state)),
                  "gated_delta: saved does not belong to these inputs");
  FromForward from{saved ? *saved : empty(t.q, {rows, inverse}), empty(t.q, {0}), {}};
  from.parts = saved_parts(in, from.inverses.mutable_data_ptr(), kept > inverse ? 2 : 1);
  if (kept > inverse || rows == 0) return from;  // all is there, or nothing to do
  from.states = empty(t.q, {rows, state});
  from.parts.states = {from.states.mutable_data_ptr(), in.shape.HV * state, state};

  ChunkFwdCuda p{in};
  p.initial_state = static_cast<const float*>(data(t.initial_state));
  const bool floats = in.q.dtype == DType::f32;  // T' of others is read
  if (!saved || !floats) p.inverse = from.parts.inverse;
  p.inverse_known = saved && !floats;
  p.states = from.parts.states;
  p.high_precision = high_precision, p.segments = segments;  // the same bits as before
  Launch launch(t.q, t.k, t.v, t.g, t.beta, t.initial_state, t.cu_seqlens, t.A_log, t.dt_bias,
                from.inverses, from.states, room);
  chunk_fwd_run(p, launch.stream());
  launch.check();
  return from;
}

void zero_tail(const ChunkBwdCuda& p, void* stream) {
  const ChunkShape& s = p.in.shape;
  const int64_t size = p.in.q.dtype == DType::f32 ? 4 : 2;
  chunk_zero_tail_cuda({p.in,
                        {{p.dq, s.H * s.K * size},
                         {p.dk, s.H * s.K * size},
                         {p.dv, s.HV * s.V * size},
                         {p.dg, s.HV * 4},
                         {p.dbeta, s.HV * 4}}},
                       stream);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients bwd(const Tensor& d_o_, const OptTensor& d_final_state_, const OptTensor& saved,
              const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& g,
              const Tensor& beta, const OptTensor& initial_state, const OptTensor& cu_seqlens,
              const OptTensor& A_log, const OptTensor& dt_bias, double scale, bool l2norm,
              double sigmoid_scale, bool state_v_first, int64_t /*chunk_size*/, bool high_precision,
              int64_t split, bool batch_invariant) {
  const ChunkTensors t = chunk_tensors(q, k, v, g, beta, initial_state, cu_seqlens, A_log, dt_bias,
                                       scale, l2norm, sigmoid_scale, state_v_first);
  const ChunkCuda& in = t.args;
  const int64_t B = q.size(0), T = q.size(1), H = q.size(2), HV = v.size(2);
  const int64_t K = q.size(3), V = v.size(3), slots = in.slots();
  const Tensor d_o = unit_last_stride(d_o_);
  const OptTensor d_final_state = float_state(d_final_state_);
  const Tensor dq = empty(q, {B, T, H, K}), dk = empty(q, {B, T, H, K});
  const Tensor dv = empty(q, {B, T, HV, V});
  const auto floats = [&](std::initializer_list<int64_t> sizes) {
    return empty(q, sizes, ScalarType::Float);
  };
  const Tensor dg = floats({B, T, HV}), dbeta = floats({B, T, HV});
  const Tensor dh0 = !initial_state  ? floats({0})
                     : state_v_first ? floats({in.N, HV, V, K})
                                     : floats({in.N, HV, K, V});
  const auto sum = [&](const OptTensor& x) { return floats({x ? HV : 0}); };
  const Tensor dA_log = sum(A_log), ddt_bias = sum(dt_bias);
  const auto partial = [&](const OptTensor& x) {
    return empty(q, {x ? std::max<int64_t>(slots, 1) : 0, HV}, ScalarType::Double);
  };
  const Tensor A_parts = partial(A_log), dt_parts = partial(dt_bias);
  const Tensor dstates = empty(q, {slots, HV, state_elements(in)});
  const int64_t segment = HV ? segment_chunks(in, split, batch_invariant) : 0;
  const int64_t segments = segment ? segment_slots(in, segment) : 0;
  const Tensor room = floats({segments * HV * segment_bytes(in) / 4});

  if (HV) {
    ChunkBwdCuda p{in, input(d_o)};
    if (segment) p.segments = segment_room(in, segment, room.mutable_data_ptr());
    const FromForward from = from_forward(t, saved, high_precision, p.segments, room);
    const auto at = [](const Tensor& x, bool wanted) {
      return wanted ? static_cast<float*>(x.mutable_data_ptr()) : nullptr;
    };
    p.d_final_state = d_final_state ? static_cast<const float*>(data(*d_final_state)) : nullptr;
    p.inverse = from.parts.inverse, p.states = from.parts.states;
    p.dstates = {dstates.mutable_data_ptr(), HV * state_elements(in), state_elements(in)};
    p.dq = dq.mutable_data_ptr(), p.dk = dk.mutable_data_ptr(), p.dv = dv.mutable_data_ptr();
    p.dg = at(dg, true), p.dbeta = at(dbeta, true), p.d_initial_state = at(dh0, !!initial_state);
    if (A_log) p.dA_log = static_cast<double*>(A_parts.mutable_data_ptr());
    if (dt_bias) p.ddt_bias = static_cast<double*>(dt_parts.mutable_data_ptr());
    p.dA_log_sum = at(dA_log, !!A_log), p.ddt_bias_sum = at(ddt_bias, !!dt_bias);
    Launch launch(t.q, t.k, t.v, t.g, t.beta, t.cu_seqlens, t.A_log, t.dt_bias, d_o, d_final_state,
                  room, from.inverses, from.states, dstates, dq, dk, dv, dg, dbeta, dh0, dA_log,
                  ddt_bias, A_parts, dt_parts);
    run(p, launch.stream());
    if (cu_seqlens) zero_tail(p, launch.stream());
    launch.check();
  }
  const auto as = [](const Tensor& x, const OptTensor& like) {
    return like ? torch::stable::to(x, like->scalar_type()) : x;
  };
  return {dq,
          dk,
          dv,
          as(dg, g),
          as(dbeta, beta),
          as(dh0, initial_state),
          as(dA_log, A_log),
          as(ddt_bias, dt_bias)};
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("gated_delta_bwd", TORCH_BOX(&df::cuda::bwd));
}
