// Of the kernel of chunk_bwd_chunks.cuh: its configurations, what lies in shared memory, and access
// to it in the order of an accumulator.
#pragma once
#include "common/cuda/mma_sm80.cuh"
#include "gated_delta/chunk_bwd_cuda.h"
#include "gated_delta/chunk_device.cuh"
#include "gated_delta/chunk_squares.cuh"

namespace df::cuda {
template <class Arch_, class E_, int kK_>
struct ChunkGradConfig {
  using Arch = Arch_;
  using E = E_;
  static constexpr int kK = kK_, kC = sizeof(E) == 2 ? 64 : 32, kV = kC;
  static constexpr int kGroupThreads = 2 * kC, kThreads = 2 * kGroupThreads;
  static constexpr int kWarps = kC / 16;                         // of a group
  static constexpr bool kPipelined = Arch::kAsync && kK <= 128;  // chunk_bwd_chunks_pipelined.cuh
  // Where registers are rare, products are of fewer columns of K (kPanel) and of C (kCols) at once;
  // operands are read for kWidth columns and kStep terms of the sums at once.
  static constexpr bool kRare = !Arch::kAsync && kK > 128;
  static constexpr int kPanel = kRare ? 32 : 64, kCols = kRare ? kC / 2 : kC;
  static constexpr int kStep = kPipelined ? kK : (kRare ? 32 : 64) / int(sizeof(E));
  static constexpr int kWidth = Arch::kAsync ? kK : sizeof(E) == 4 ? 64 : kK <= 192 ? kK : 128;
  static constexpr bool kOneState = !Arch::kAsync && sizeof(E) == 2 && kK == 256;
  static constexpr int kLaunched = kThreads + (kPipelined ? 128 : 0);
  using KeyTile = Tile<E, kC, kK>;
  using StateTile = Tile<E, kV, kK>;
  using SquareTile = Tile<E, kC, kC>;  // C x C, and C x one tile of V
};

// Where rows of a chunk come from: rows t and heads h elements apart.
struct ChunkRows {
  const void* first;  // of head 0
  int64_t t, h;
  int64_t vectors;  // whether they can be copied by whole 16 bytes
};

// What the CTA works on, prepared once: in shared memory, since registers are rare.
struct alignas(16) ChunkGradPlace {
  ChunkRows v, dO, dW;
  ChunkRows states, dstates, inverse;  // h only
  int64_t first;                       // token
  int slot, key_head, batch, rows;
  uint32_t tiles, zero;  // where the tiles are; 0
};

// What the scalar gradients of a head are made of.
template <class C>
struct ChunkGradSums {
  float columns[2][C::kWarps][C::kC];  // sums over a warp's rows, of queries and keys
  float rectangle[2][C::kC];           // sum_{i>=t>j} Z_ij, their parts
  float rho[C::kC], kap[C::kC];        // kap without beta
  float inner[C::kWarps];              // <S0, dS> by warp
};
template <class C>
struct ChunkGradScalars {
  ChunkGradPlace place;
  TokenTable<C::kC> table[2];  // of this head and the next; the norms in the first
  ChunkGradSums<C> sums[C::kPipelined ? 2 : 1];
  uint64_t full[2];  // mbarriers of the pipelined kernel's stages
};

// The tiles, one after the other in shared memory, and the scalars behind them.
template <class C>
struct ChunkGradTiles {
  using KeyTile = typename C::KeyTile;
  using StateTile = typename C::StateTile;
  using SquareTile = typename C::SquareTile;
  static constexpr int kState = 2 * KeyTile::kBytes;
  static constexpr int kSquare = kState + (C::kOneState ? 1 : 2) * StateTile::kBytes;
  static constexpr int kScalars = kSquare + 7 * SquareTile::kBytes;
  // One accumulator a thread, C x C: `square` between the tiles of V where registers are rare,
  // and gram, each where it fits.
  static constexpr int kLimit = (C::Arch::kAsync ? 227 : 163) * 1024;
  static constexpr int kAccumulators = C::kThreads * C::kC * 2;
  static constexpr int kKept = kScalars + int(sizeof(ChunkGradScalars<C>) + 15) / 16 * 16;
  static constexpr bool kKeepsSquare = C::kK > 128 && kKept + kAccumulators <= kLimit;
  static constexpr int kGram = kKept + (kKeepsSquare ? kAccumulators : 0);
  static constexpr bool kKeepsGram = kGram + kAccumulators <= kLimit;
  static constexpr int kBytes = kGram + (kKeepsGram ? kAccumulators : 0);
  static_assert(kBytes <= kLimit);
  uint32_t base;

  __device__ KeyTile key(int i) const { return {base + i * KeyTile::kBytes}; }  // q, k: as given
  __device__ StateTile s() const { return {base + kState}; }                    // S0^T
  __device__ StateTile ds() const {                                             // dS^T
    return {base + kState + (C::kOneState ? 0 : StateTile::kBytes)};
  }
  // T' and what its rounding left; after their last use dP and dKK
  __device__ SquareTile square(int i) const { return {base + kSquare + i * SquareTile::kBytes}; }
  __device__ SquareTile a(int i) const { return square(2 + i); }  // dO, dW
  __device__ SquareTile v() const { return square(4); }
  __device__ SquareTile w() const { return square(5); }                 // W, then E
  __device__ SquareTile factors(int i) const { return square(6 - i); }  // dP; dKK in E's place
};

// Likewise of the pipelined kernel, with two stages of what belongs to a tile of V.
template <class C>
struct ChunkGradStages {
  using KeyTile = typename C::KeyTile;
  using StateTile = typename C::StateTile;
  using SquareTile = typename C::SquareTile;
  static constexpr int kSquare = 2 * KeyTile::kBytes;
  static constexpr int kFirst = kSquare + 4 * SquareTile::kBytes;
  static constexpr int kStage = 2 * StateTile::kBytes + 4 * SquareTile::kBytes;
  static constexpr int kScalars = kFirst + 2 * kStage;
  static constexpr int kBytes = kScalars + int(sizeof(ChunkGradScalars<C>) + 15) / 16 * 16;
  static_assert(kBytes <= 227 * 1024);
  static constexpr bool kKeepsSquare = false, kKeepsGram = false;
  uint32_t base, stage;  // stage: where that of the tile starts

  __device__ void enter(int tile) { stage = base + kFirst + uint32_t(tile & 1) * kStage; }
  __device__ KeyTile key(int i) const { return {base + i * KeyTile::kBytes}; }
  __device__ SquareTile inverse(int i) const { return {base + kSquare + i * SquareTile::kBytes}; }
  __device__ SquareTile square(int i) const { return inverse(2 + i); }  // dP, dKK
  __device__ StateTile s() const { return {stage}; }
  __device__ StateTile ds() const { return {stage + StateTile::kBytes}; }
  __device__ SquareTile of_stage(int i) const {
    return {stage + 2 * StateTile::kBytes + i * SquareTile::kBytes};
  }
  __device__ SquareTile a(int i) const { return of_stage(i); }  // dO, dW
  __device__ SquareTile v() const { return of_stage(2); }
  __device__ SquareTile w() const { return v(); }
  __device__ SquareTile e() const { return of_stage(3); }
};

// What a lane needs of its rows of an accumulator, row and row + 8 of a warp's 16 from `first` on;
// its columns are col and col + 1 of each 8.
template <int kC>
struct LaneRows {
  int row, col;
  float2 G[2];
  __device__ LaneRows(const TokenTable<kC>& t, int first) {
    const int lane = thread_anew() % 32;
    row = first + lane / 4, col = lane % 4 * 2;
    G[0] = t.G[row], G[1] = t.G[row + 8];
  }
};
// d = e^{G_i - G_j} for the columns of tile n; 0 above the diagonal, as in LaneDecays.
template <int kC>
__device__ inline void lower_decays(const TokenTable<kC>& t, const LaneRows<kC>& r, int n,
                                    float (&d)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int j = 8 * n + r.col + i % 2;
    const float x = difference(r.G[i / 2], t.G[j]);
    d[i] = exp2_fast(r.row + i / 2 * 8 >= j ? x : -INFINITY);
  }
}

// Where a lane of an accumulator has its two neighbouring elements of each 8 columns in a tile.
// `first` is that of n = 0 in a tile that starts `offset` bytes before: in tiles at constant
// distances the units of 16 bytes are changed alike behind the swizzle, which shares addresses.
template <class T>
struct TilePairs {
  uint32_t first, offset;
  __device__ uint32_t at(int n, int half) const {  // half: 8 rows below, a period of the swizzle
    constexpr int kBytes = 8 * int(sizeof(typename T::E)), kPerPanel = 128 / kBytes;
    return (first ^ uint32_t(n % kPerPanel * kBytes)) + offset +
           uint32_t(n / kPerPanel * T::kRows * 128 + half * 1024);
  }
};
template <class E>
__device__ inline float2 load_pair_at(uint32_t from) {
  if constexpr (sizeof(E) == 2) {
    uint32_t both;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(both) : "r"(from) : "memory");
    return unpack<E>(both);
  } else {
    return sm80::load_two(from);
  }
}
template <class E>
__device__ inline void store_pair_at(uint32_t to, float x, float y) {
  if constexpr (sizeof(E) == 2)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(pack<E>(x, y)) : "memory");
  else
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}
__device__ inline uint4 load_unit(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
template <class E>
__device__ inline float dot_words(uint32_t x, uint32_t y) {
  if constexpr (sizeof(E) == 2) {
    const float2 a = unpack<E>(x), b = unpack<E>(y);
    return a.x * b.x + a.y * b.y;
  } else {
    return __uint_as_float(x) * __uint_as_float(y);
  }
}

// The rows g of a fragment times factor[0], g + 8 times factor[1].
template <int kN, class E>
__device__ inline void scale_fragment(Fragment<E, kN>& a, const float (&factor)[2]) {
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int k = 0; k < kN / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<E>(a.r[k][i]);
        a.r[k][i] = pack<E>(x.x * factor[i % 2], x.y * factor[i % 2]);
      }
  } else {
#pragma unroll
    for (int k = 0; k < kN / 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a.r[k][i] *= factor[i / 2];
  }
}
}  // namespace df::cuda
