// What all CUDA kernels of the chunk form do around their products: from a block to a chunk of a
// sequence, the table of a chunk's tokens, the norms of rows.
#pragma once
#include "common/cuda/reduce.cuh"
#include "common/cuda/tile.cuh"
#include "gated_delta/chunk_cuda.h"
#include "gated_delta/head_gate.cuh"

namespace df::cuda {
struct Span {  // a sequence: tokens [begin, end) of row `batch`; the slot of its first chunk
  int64_t batch, begin, end, slot;
};

// Offsets are taken as they are on the device: whatever they hold, no token outside [0, T) is read.
__device__ inline int64_t token_offset(const ChunkCuda& p, int64_t n) {
  const int64_t at = p.cu64 ? static_cast<const int64_t*>(p.cu_seqlens)[n]
                            : static_cast<const int32_t*>(p.cu_seqlens)[n];
  return at < 0 ? 0 : at < p.shape.T ? at : p.shape.T;
}
// C: tokens of a slot, those of a chunk or of several.
__device__ inline Span sequence_span(const ChunkCuda& p, int64_t n, int64_t C) {
  const int64_t T = p.shape.T;
  if (!p.cu_seqlens) return {n, 0, T, n * ((T + C - 1) / C)};
  const int64_t begin = token_offset(p, n), end = token_offset(p, n + 1);
  return {0, begin, end < begin ? begin : end, begin / C + n};
}

__device__ inline Span sequence_span(const ChunkCuda& p, int64_t n) {
  return sequence_span(p, n, p.shape.C);
}

struct ChunkPlace {
  Span sequence;
  int64_t n, chunk;  // of the sequence; first token begin + chunk C
  int rows;          // tokens of it; 0: the slot is empty
};
__device__ inline ChunkPlace chunk_place(const ChunkCuda& p, int64_t slot, int64_t C) {
  int64_t n = 0;
  if (!p.cu_seqlens) {
    n = slot / ((p.shape.T + C - 1) / C);
  } else {  // the last sequence whose first slot is not behind this one
    int64_t behind = p.N;
    while (behind - n > 1) {
      const int64_t middle = (n + behind) / 2;
      (token_offset(p, middle) / C + middle <= slot ? n : behind) = middle;
    }
  }
  const Span s = sequence_span(p, n, C);
  const int64_t chunk = slot - s.slot, left = s.end - s.begin - chunk * C;
  return {s, n, chunk, int(left < 0 ? 0 : left < C ? left : C)};
}

__device__ inline ChunkPlace chunk_place(const ChunkCuda& p, int64_t slot) {
  return chunk_place(p, slot, p.shape.C);
}

// 2^x, to 2 ulp; 0 for x below -126.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The tokens of one chunk and value head, in shared memory. G, the running sum of g from the start
// of the chunk, is kept times log2(e) as a sum of two floats: differences of two are right to 2^-24
// of themselves, however large G is. Tokens behind `rows`: g = 0 and beta = 0, so that G is
// constant.
template <int kC>
struct alignas(16) TokenTable {
  float2 G[kC];
  float gam[kC], del[kC];  // e^{G_i}, e^{G_C - G_i}
  float beta[kC];
  float rq[kC], rk[kC];  // 1 / |q|, 1 / |k|, or 1; filled by row_norms
  float chunk_decay;     // e^{G_C}
};

struct Token {
  float raw, g, beta;  // the argument g; that after the gate, not clamped; beta after the sigmoid
};
__device__ inline Token make_token(const ChunkCuda& p, const HeadGate& h, uint32_t g,
                                   uint32_t beta) {
  Token x;
  x.raw = to_float(g, p.g.dtype), x.g = gate(h, x.raw);
  x.beta = to_float(beta, p.beta.dtype);
  if (p.pre.sigmoid_scale > 0) x.beta = float(p.pre.sigmoid_scale) * sigmoid(x.beta);
  return x;
}
__device__ inline Token load_token(const ChunkCuda& p, const HeadGate& h, int64_t batch,
                                   int64_t token, int64_t head) {
  return make_token(p, h, load_bits(p.g, offset(p.g, batch, token, head)),
                    load_bits(p.beta, offset(p.beta, batch, token, head)));
}

// A lane's tokens of a chunk, from kPer lane on, as they are in memory.
template <int kC>
struct LaneTokens {
  static constexpr int kPer = kC / 32;
  uint32_t g[kPer], beta[kPer];
};
// `first` is the chunk's first token. By one whole warp.
template <int kC>
__device__ inline void fetch_tokens(const ChunkCuda& p, int64_t batch, int64_t first, int rows,
                                    int64_t head, LaneTokens<kC>& x) {
#pragma unroll
  for (int i = 0; i < x.kPer; ++i) {
    const int at = threadIdx.x % 32 * x.kPer + i;
    x.g[i] = x.beta[i] = 0;
    if (at >= rows) continue;
    x.g[i] = load_bits(p.g, offset(p.g, batch, first + at, head));
    x.beta[i] = load_bits(p.beta, offset(p.beta, batch, first + at, head));
  }
}

// By the same warp; a barrier has to follow.
template <int kC>
__device__ inline void make_tokens(const ChunkCuda& p, const LaneTokens<kC>& x, int rows,
                                   int64_t head, TokenTable<kC>& table) {
  constexpr double kLog2e = 1.4426950408889634;
  constexpr int kPer = x.kPer;
  const int lane = threadIdx.x % 32;
  const HeadGate of_head = head_gate(p.pre, head);
  double sums[kPer], sum = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const bool inside = lane * kPer + i < rows;
    const Token token = make_token(p, of_head, x.g[i], x.beta[i]);
    sums[i] = sum += inside ? clamp_gate(token.g) : 0;
    table.beta[lane * kPer + i] = inside ? token.beta : 0;
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  const double before = sum - sums[kPer - 1], all = __shfl_sync(0xffffffffu, sum, 31);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    const double G = (before + sums[i]) * kLog2e;
    const float high = float(G);
    table.G[lane * kPer + i] = {high, float(G - high)};
    table.gam[lane * kPer + i] = exp2_fast(float(G));
    table.del[lane * kPer + i] = exp2_fast(float(all * kLog2e - G));
  }
  if (lane == 0) table.chunk_decay = exp2_fast(float(all * kLog2e));
}

template <int kC>
__device__ inline void load_tokens(const ChunkCuda& p, int64_t batch, int64_t first, int rows,
                                   int64_t head, TokenTable<kC>& table) {
  LaneTokens<kC> x;
  fetch_tokens(p, batch, first, rows, head, x);
  make_tokens(p, x, rows, head, table);
}

// r[i] = (sum over row i of x^2 + 1e-6)^-1/2 of a tile, two lanes a row; by kThreads threads, which
// are numbered from 0 by `thread`. All ones if not l2norm.
template <int kThreads, class T>
__device__ inline void row_norms(const T& tile, bool l2norm, int thread, float* r) {
  using E = typename T::E;
  constexpr int kUnit = 16 / int(sizeof(E));
  for (int i = thread / 2; i < T::kRows; i += kThreads / 2) {
    float sum = 0;
    for (int col = thread % 2 * kUnit; l2norm && col < T::kCols; col += 2 * kUnit) {
      uint4 x;
      asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                   : "r"(tile.at(i, col))
                   : "memory");
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (uint32_t word : words) {
        if constexpr (sizeof(E) == 2) {
          const float2 y = unpack<E>(word);
          sum += y.x * y.x + y.y * y.y;
        } else {
          sum += __uint_as_float(word) * __uint_as_float(word);
        }
      }
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    if (thread % 2 == 0) r[i] = l2norm ? 1.0f / sqrtf(sum + 1e-6f) : 1.0f;
  }
}

// A tile from rows of a tensor, by all threads of the CTA that take part (numbered from 0): whole
// 16 bytes by cp.async where kVectors (rows and base on multiples of 16 bytes, cols whole units),
// else element by element. Rows from `rows` on and columns from `cols` on become zero. The caller
// waits for the copies.
template <bool kVectors, int kThreads, class T>
__device__ inline void load_tile(const T& tile, const typename T::E* from, int64_t stride, int rows,
                                 int cols, int thread) {
  using E = typename T::E;
  constexpr int kWidth = kVectors ? 16 / int(sizeof(E)) : 1, kUnits = T::kCols / kWidth;
  static_assert(T::kRows * kUnits % kThreads == 0);
#pragma unroll(kVectors ? 4 : 1)
  for (int step = 0; step < T::kRows * kUnits / kThreads; ++step) {
    const int i = step * kThreads + thread, row = i / kUnits, col = i % kUnits * kWidth;
    const bool inside = row < rows && col < cols;
    if constexpr (kVectors) {
      cp_async16(tile.at(row, col), inside ? from + row * stride + col : from, inside ? 16 : 0);
    } else {
      E x{};
      if (inside) x = from[row * stride + col];
      if constexpr (sizeof(E) == 2)
        asm volatile("st.shared.b16 [%0], %1;" ::"r"(tile.at(row, col)), "h"(x.bits) : "memory");
      else
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(tile.at(row, col)), "f"(x) : "memory");
    }
  }
}
}  // namespace df::cuda
