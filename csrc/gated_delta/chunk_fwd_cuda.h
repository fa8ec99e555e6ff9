// The forward kernels of the chunk form on CUDA, and what the backward takes from them.
#pragma once
#include "gated_delta/chunk_segments.h"

namespace df {
struct ChunkFwdCuda {
  ChunkCuda in;
  const float* initial_state;  // may be null
  void* o;                     // [B,T,HV,V]; null: states and inverses only, q is not read
  float* final_state;          // may be null
  BySlot inverse;              // 16 bits: made first, and read; floats: written, unless null
  BySlot states;               // may be null
  bool inverse_known;          // 16 bits: it is there already
  Segments segments;
  bool summary;  // no outputs but M and H of segments
  bool high_precision;
  bool vectors;  // rows of q, k and v are whole 16 bytes
  int64_t sms;   // of the device
};

// T' of 16-bit inputs. They return a cudaError_t.
int chunk_inverse_bf16_cuda(const ChunkFwdCuda&, void* stream);
int chunk_inverse_f16_cuda(const ChunkFwdCuda&, void* stream);
// By the element type, on mma.sync: any device, any strides.
void chunk_fwd_f32_cuda(const ChunkFwdCuda&, void* stream);
void chunk_fwd_bf16_cuda(const ChunkFwdCuda&, void* stream);
void chunk_fwd_f16_cuda(const ChunkFwdCuda&, void* stream);
// On wgmma, for inputs that TMA loads (chunk_tma.h); null in a build without sm_90a, which has no
// such files. They return a cudaError_t.
[[gnu::weak]] int chunk_fwd_bf16_sm90_cuda(const ChunkFwdCuda&, void* stream);
[[gnu::weak]] int chunk_fwd_f16_sm90_cuda(const ChunkFwdCuda&, void* stream);

// Tokens behind the last sequence become zero in tensors of [1, T, ...].
struct TailRows {
  void* data;     // may be null
  int64_t bytes;  // of a token
};
struct ChunkTail {
  ChunkCuda in;
  TailRows rows[5];
};
void chunk_zero_tail_cuda(const ChunkTail&, void* stream);
}  // namespace df
