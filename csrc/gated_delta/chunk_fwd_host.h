// Runs the forward of the chunk form on CUDA; the backward does so, too, for states not saved.
#pragma once
#include "common/cuda_shim.h"
#include "common/op.h"
#include "gated_delta/chunk_fwd_cuda.h"
#include "gated_delta/chunk_tma.h"

namespace df::cuda {
inline int sm_count() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

inline void check_launch(int e) {
  STD_TORCH_CHECK(e == 0, "gated_delta: ", cudaGetErrorString(cudaError_t(e)));
}
// T' of 16-bit inputs, which all passes read.
inline void chunk_inverse_pass(ChunkFwdCuda p, void* stream) {
  p.vectors = whole_vectors(tma_keys(p.in, p.in.k));
  if (p.in.slots() == 0) return;
  check_launch(p.in.q.dtype == DType::bf16 ? chunk_inverse_bf16_cuda(p, stream)
                                           : chunk_inverse_f16_cuda(p, stream));
}

// wgmma where the device has it and TMA can load the inputs, else mma.sync.
inline void chunk_fwd_pass(ChunkFwdCuda p, void* stream) {
  const ChunkCuda& in = p.in;
  const Tensor4 tensors[3] = {tma_keys(in, p.o ? in.q : in.k), tma_keys(in, in.k),
                              tma_values(in, in.v)};
  bool tma = true;
  p.vectors = true, p.sms = sm_count();
  for (const Tensor4& t : tensors) tma &= tma_loads(t), p.vectors &= whole_vectors(t);
  auto* const sm90 =
      in.q.dtype == DType::bf16 ? &chunk_fwd_bf16_sm90_cuda : &chunk_fwd_f16_sm90_cuda;
  if (tma && sm90 && sm() == 90) return check_launch(sm90(p, stream));
  switch (in.q.dtype) {
    case DType::f32: return chunk_fwd_f32_cuda(p, stream);
    case DType::bf16: return chunk_fwd_bf16_cuda(p, stream);
    default: return chunk_fwd_f16_cuda(p, stream);
  }
}

inline int64_t segment_bytes(const ChunkCuda& p) {  // of room, a segment and head
  const int64_t K = pad64(p.shape.K);
  return (pad64(p.shape.V) + K) * K * 4;
}

// Chunks of a segment, 0 for none. Invariant: decided as for a single sequence of 512 chunks, so
// that a sequence is cut in the same places whatever else is in the batch.
inline int64_t segment_chunks(const ChunkCuda& p, int64_t split, bool invariant) {
  constexpr int64_t kNominal = 512, kMostBytes = 32 << 20;
  const ChunkShape& s = p.shape;
  if (split < 0 || p.N * s.HV * s.T == 0) return 0;
  const bool forced = split > 0;
  const int64_t length = p.cu_seqlens ? (s.T + p.N - 1) / p.N : s.T;
  int64_t chunks = (length + s.C - 1) / s.C;
  if (forced && p.cu_seqlens && chunks < 2) chunks = 2;  // some sequence may have more than most
  const int64_t rows = s.K <= 128 ? 128 : 64;
  const auto tiles = [&](int64_t n) { return (n + rows - 1) / rows; };
  SegmentChoice choice{p.N * s.HV, chunks, tiles(s.V), tiles(s.K), sm_count(), 0};
  if (invariant) choice.chains = s.HV, choice.chunks = kNominal;
  choice.most_parts = invariant ? kNominal : kMostBytes / (choice.chains * segment_bytes(p));
  const int64_t segment = choice.segment(forced);
  return segment * s.C < s.T ? segment : 0;
}

// With segments, their room given in p.segments: first what each makes of the state that enters it,
// then these states, then all segments side by side.
inline void chunk_fwd_run(const ChunkFwdCuda& p, void* stream) {
  const bool floats = p.in.q.dtype == DType::f32;
  if (!floats && !p.inverse_known) chunk_inverse_pass(p, stream);
  if (p.segments.chunks) {
    ChunkFwdCuda summary = p;
    summary.summary = true, summary.o = nullptr, summary.final_state = nullptr;
    summary.states = {};
    if (floats) summary.inverse = {};
    chunk_fwd_pass(summary, stream);
    chunk_scan_cuda({p.in, p.segments}, stream);
  }
  chunk_fwd_pass(p, stream);
}
}  // namespace df::cuda
