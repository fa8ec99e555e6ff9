// The seam of the two convolutions over time of Deep Delta Learning, with taps w [K, d, d_v]:
//   read-out (TC)   y_{t,i}  = sum_{s,j} w_{s,i,j} x_{t-s,i,j}      C = d d_v channels to d
//   expansion (EC)  y_{t,ij} = sum_s w_{s,i,j} x_{t-s,i}            d channels to C
// Positions t are counted within a sequence; the K - 1 inputs before it are its initial state, and
// the last K - 1 its final state. States are [N, channels of x, K-1], oldest first.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"
#include "common/sequences.h"

namespace df {
struct MixRows {  // [B,T,...] whose tokens are contiguous; strides in elements
  const void* data = nullptr;
  int64_t b = 0, t = 0;
};

struct MixShape {
  bool expand;
  int64_t B, T, N, d, dv, K;
  constexpr int64_t channels() const { return d * dv; }
  constexpr int64_t in() const { return expand ? d : d * dv; }
  constexpr int64_t out() const { return expand ? d * dv : d; }
};

struct MixFwdArgs {
  MixShape shape;
  DType dtype;  // of x, y and states
  MixRows x;
  const void* w;        // [K, d, d_v], compute type
  const void* initial;  // may be null: zeros; as the final state, null if it is not wanted
  void *y, *final;      // contiguous
};

struct MixBwdArgs {
  MixShape shape;
  DType dtype;  // of x, dy, dx and the initial state
  MixRows x, dy;
  const void *w, *initial;
  const void* d_final;  // compute type, as d_initial; may be null
  void *dx, *d_initial;
};

// CUDA: a CTA walks a chunk of tokens of one row. Chunks depend on the sizes alone, and with them
// the bits of the taps' gradient: a partial sum each, and one for each initial state.
inline int64_t mix_chunk(const MixShape& s, bool backward) {
  constexpr int64_t kThreads = 132 * 512;  // fill a GPU; 8 channels a thread
  int64_t chunk = backward ? 256 : 128;
  while (chunk > 16 && s.B * s.T * s.channels() < kThreads * 8 * chunk) chunk /= 2;
  return chunk;
}
inline int64_t mix_chunks(const MixShape& s, bool backward) {
  const int64_t chunk = mix_chunk(s, backward);
  return s.B * ((s.T + chunk - 1) / chunk);
}
inline int64_t mix_partial_rows(const MixShape& s, bool initial) {
  return mix_chunks(s, true) + (initial && s.K > 1 ? s.N : 0);
}
struct MixSums {
  float* partial;  // [rows, K, d, d_v]: chunks, then sequences that have an initial state
  int64_t rows;
  float* dw;  // [K, d, d_v]
};
// By element type; the compute type is float.
void mix_fwd_f32_cuda(const MixFwdArgs& args, const Offsets& offsets, void* stream);
void mix_fwd_bf16_cuda(const MixFwdArgs& args, const Offsets& offsets, void* stream);
void mix_fwd_f16_cuda(const MixFwdArgs& args, const Offsets& offsets, void* stream);
void mix_bwd_f32_cuda(const MixBwdArgs& args, const MixSums& sums, const Offsets& offsets,
                      void* stream);
void mix_bwd_bf16_cuda(const MixBwdArgs& args, const MixSums& sums, const Offsets& offsets,
                       void* stream);
void mix_bwd_f16_cuda(const MixBwdArgs& args, const MixSums& sums, const Offsets& offsets,
                      void* stream);
void mix_sums_cuda(const MixShape& shape, const MixSums& sums, void* stream);

namespace cpu {
struct MixTile {  // tokens [begin, end) of a sequence, which is tokens [first, last) of a row
  int64_t n, batch, first, last, begin, end;
};
constexpr int64_t kMixChannels = 512;          // of d d_v, a block; whole vectors of features
constexpr int64_t kMixTile = 64;               // the longest tile
inline int64_t mix_block(const MixShape& s) {  // features
  return kMixChannels / s.dv / 16 * 16;
}
// Scratch, zeroed before its first use, of bytes that these functions know; features from f0 on.
DF_DECLARE_CPU(mix_scratch, const MixShape&, DType, int64_t* bytes)
DF_DECLARE_CPU(mix_fwd, const MixFwdArgs&, const MixTile&, int64_t f0, void* scratch)
// Adds to sums [K, d, d_v], compute type. A tile may be empty.
DF_DECLARE_CPU(mix_bwd, const MixBwdArgs&, const MixTile&, int64_t f0, void* sums, void* scratch)
}  // namespace cpu
}  // namespace df
