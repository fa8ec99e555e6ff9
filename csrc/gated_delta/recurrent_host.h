// The per-token form's tensors to the plain arguments of recurrent.h, for every device.
#pragma once
#include "gated_delta/input_host.h"
#include "gated_delta/recurrent.h"

namespace df {
constexpr int64_t kCheckpoint = 64;  // tokens between two states that the backward keeps

struct RecurrentTensors {  // with unit last strides; owns the copies where there were none
  Tensor q, k, v;
  OptTensor g, gk, gv, beta, initial_state, A_log, dt_bias;

  RecurrentInputs args(double scale, bool l2norm, double sigmoid_scale, bool state_v_first,
                       const Sequence* sequences) const {
    const auto in = [](const OptTensor& t) { return t ? input(*t) : Input{}; };
    const ChunkShape shape{q.size(1), q.size(2), v.size(2), q.size(3), v.size(3), kCheckpoint};
    return {{shape,
             input(q),
             input(k),
             input(v),
             in(g),
             in(beta),
             dense(initial_state),
             sequences,
             {dense(A_log), dense(dt_bias), sigmoid_scale},
             scale,
             l2norm,
             state_v_first},
            in(gk),
            in(gv),
            beta && beta->dim() == 4};
  }
};

inline RecurrentTensors recurrent_tensors(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const OptTensor& g, const OptTensor& gk,
                                          const OptTensor& gv, const OptTensor& beta,
                                          const OptTensor& initial_state, const OptTensor& A_log,
                                          const OptTensor& dt_bias) {
  STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "gated_delta: q, k, v must be 4-dimensional");
  STD_TORCH_CHECK(q.size(3) <= kMaxHeadDim && v.size(3) <= kMaxHeadDim,
                  "gated_delta: head dimensions above 256: K = ", q.size(3), ", V = ", v.size(3));
  const auto rows = [&](const OptTensor& t) {
    return t ? OptTensor(unit_last_stride(readable(*t, q))) : t;
  };
  return {unit_last_stride(q),
          unit_last_stride(k),
          unit_last_stride(v),
          g,
          rows(gk),
          rows(gv),
          beta && beta->dim() == 4 ? rows(beta) : beta,
          readable_state(initial_state, q),
          contiguous(A_log),
          contiguous(dt_bias)};
}

// States of n sequences in the compute type; empty unless wanted.
inline Tensor empty_states(const Tensor& q, bool wanted, int64_t n, const ChunkShape& s,
                           bool v_first) {
  const ScalarType type = compute_type(q);
  if (!wanted) return empty(q, {0}, type);
  return v_first ? empty(q, {n, s.HV, s.V, s.K}, type) : empty(q, {n, s.HV, s.K, s.V}, type);
}

// The gradient of t in the compute type, contiguous; empty without a t.
inline Tensor empty_as(const OptTensor& t, const Tensor& q) {
  const ScalarType type = compute_type(q);
  if (!t) return empty(q, {0}, type);
  return t->dim() == 4 ? empty(q, {t->size(0), t->size(1), t->size(2), t->size(3)}, type)
                       : empty(q, {t->size(0), t->size(1), t->size(2)}, type);
}
inline Tensor like(const Tensor& gradient, const OptTensor& t) {
  return t ? torch::stable::to(gradient, t->scalar_type()) : gradient;
}

using RecurrentGradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
}  // namespace df
