// The tensors of the chunk operators to the plain arguments of chunk_cuda.h; Python has checked
// shapes and types. Shared by forward and backward.
#pragma once
#include "common/cuda_shim.h"
#include "gated_delta/chunk_cuda.h"
#include "gated_delta/input_host.h"

namespace df::cuda {
struct ChunkTensors {  // with unit last strides, states in float32; owns the copies
  Tensor q, k, v, g, beta;
  OptTensor initial_state, cu_seqlens, A_log, dt_bias;
  ChunkCuda args;
};

inline int64_t chunk_tokens(const Tensor& q) {
  return q.scalar_type() == ScalarType::Float ? 32 : 64;
}

inline OptTensor float_state(const OptTensor& t) {
  return t ? OptTensor(contiguous(torch::stable::to(*t, ScalarType::Float))) : t;
}

inline ChunkTensors chunk_tensors(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Tensor& g, const Tensor& beta,
                                  const OptTensor& initial_state, const OptTensor& cu_seqlens,
                                  const OptTensor& A_log, const OptTensor& dt_bias, double scale,
                                  bool l2norm, double sigmoid_scale, bool state_v_first) {
  STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, "gated_delta: q, k, v must be 4-dimensional");
  STD_TORCH_CHECK(q.size(3) >= 1 && v.size(3) >= 1 && q.size(3) <= 256 && v.size(3) <= 256,
                  "gated_delta: K = ", q.size(3), ", V = ", v.size(3), " must be 1 to 256");
  STD_TORCH_CHECK(q.scalar_type() != ScalarType::Double, "gated_delta: no float64 on CUDA");
  ChunkTensors t{unit_last_stride(q),
                 unit_last_stride(k),
                 unit_last_stride(v),
                 g,
                 beta,
                 float_state(initial_state),
                 contiguous(cu_seqlens),
                 contiguous(A_log),
                 contiguous(dt_bias),
                 ChunkCuda{}};
  ChunkCuda& p = t.args;
  p.shape = {q.size(1), q.size(2), v.size(2), q.size(3), v.size(3), chunk_tokens(q)};
  p.B = q.size(0), p.N = cu_seqlens ? cu_seqlens->numel() - 1 : p.B;
  p.cu_seqlens = data(t.cu_seqlens);
  p.cu64 = cu_seqlens && cu_seqlens->scalar_type() == ScalarType::Long;
  p.q = input(t.q), p.k = input(t.k), p.v = input(t.v), p.g = input(g), p.beta = input(beta);
  p.pre = {dense(t.A_log), dense(t.dt_bias), sigmoid_scale};
  p.scale = float(scale), p.l2norm = l2norm, p.state_v_first = state_v_first;
  return t;
}

// Elements of T' a slot and head, and of S^T.
inline int64_t inverse_elements(const ChunkCuda& p) {
  return p.q.dtype == DType::f32 ? p.shape.C * p.shape.C : 2 * p.shape.C * p.shape.C;
}
inline int64_t state_elements(const ChunkCuda& p) {
  return pad64(p.shape.K) * pad64(p.shape.V);
}
// The parts of `saved`: INVERSES (1) has the first alone, STATES (2) both.
struct Saved {
  BySlot inverse, states;
};
inline Saved saved_parts(const ChunkCuda& p, void* saved, int64_t saving) {
  if (!saved || saving == 0) return {};
  const int64_t first = inverse_elements(p);
  const int64_t all = first + (saving == 2 ? state_elements(p) : 0), slot = all * p.shape.HV;
  char* const at = static_cast<char*>(saved);
  void* const states = saving == 2 ? at + first * (p.q.dtype == DType::f32 ? 4 : 2) : nullptr;
  return {{saved, slot, all}, {states, slot, all}};
}
}  // namespace df::cuda
