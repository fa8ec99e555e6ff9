// Inputs of the chunk form as TMA sees them.
#pragma once
#include "common/cuda/tma.h"
#include "gated_delta/chunk_cuda.h"

namespace df {
// [B, T, heads, cols]; an axis of one element has no stride to speak of.
inline Tensor4 tma_tensor(const ChunkCuda& p, const Input& x, int64_t heads, int64_t cols) {
  Tensor4 t{x.data, x.dtype, {cols, heads, p.shape.T, p.B}, {x.h, x.t, x.b}};
  for (int i = 0; i < 3; ++i)
    if (t.size[i + 1] == 1) t.stride[i] = 8;
  return t;
}
inline Tensor4 tma_keys(const ChunkCuda& p, const Input& x) {
  return tma_tensor(p, x, p.shape.H, p.shape.K);
}
inline Tensor4 tma_values(const ChunkCuda& p, const Input& x) {
  return tma_tensor(p, x, p.shape.HV, p.shape.V);
}

// T' of 16-bit inputs by slot and head: [slots, 2 C, HV, C].
inline Tensor4 tma_inverse(const ChunkCuda& p, const BySlot& x) {
  const ChunkShape& s = p.shape;
  return {x.data, p.q.dtype, {s.C, s.HV, 2 * s.C, p.slots()}, {x.head, s.C, x.slot}};
}

// Whether wgmma kernels can load it: 16 bits, 16-byte boundaries, no broadcast and no empty axis.
inline bool tma_loads(const Tensor4& t) {
  bool can = (t.dtype == DType::bf16 || t.dtype == DType::f16) && has_tensor_map(t);
  for (int64_t stride : t.stride) can &= stride > 0;
  for (int64_t size : t.size) can &= size > 0;
  return can;
}

// Whether load_tile can take whole 16 bytes.
inline bool whole_vectors(const Tensor4& t) {
  const int64_t unit = t.dtype == DType::f32 ? 4 : 8;
  bool whole = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.size[0] % unit == 0;
  for (int64_t stride : t.stride) whole &= stride % unit == 0;
  return whole;
}
}  // namespace df
