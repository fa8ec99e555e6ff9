// The seam of the chunk form on CUDA: plain arguments of its kernels. Shapes as in chunk.h.
//
// Chunks have C tokens from the start of their sequence: 64, or 32 for float32. A chunk of a
// sequence has a slot: n ceil(T / C) + c without cu_seqlens, cu_seqlens[n] / C + n + c with; both
// rise with n and c, and some slots of the second kind stay empty. Everything that is kept by chunk
// is indexed by slot and value head, [slots, HV, ...]:
//   inverse   T', C x C by rows, in the inputs' type; of 16 bits: as a sum of two, one after the
//   other states    S^T, the state that enters the chunk, Vp x Kp by rows, in the inputs' type
//   dstates   likewise the gradient of the state that leaves it
// with Kp, Vp = K, V padded to 64; the padding holds zeros. `saved` of the operator has for each
// slot and head the inverse and, if it was saved, the state behind it.
#pragma once
#include "gated_delta/chunk.h"

namespace df {
struct ChunkCuda {
  ChunkShape shape;        // C: that of the kernels
  int64_t B, N;            // N: sequences
  const void* cu_seqlens;  // [N + 1] on the device, or null
  bool cu64;
  Input q, k, v, g, beta;
  PreActivation pre;
  float scale;
  bool l2norm, state_v_first;

  int64_t slots() const { return saved_slots(shape, B, N, cu_seqlens != nullptr); }
};

// One of the arrays by slot and head; data may be null. Strides in elements.
struct BySlot {
  void* data;
  int64_t slot, head;
};

constexpr int64_t pad64(int64_t n) {
  return (n + 63) / 64 * 64;
}
}  // namespace df
