// What the kernels of product.h share: which tile of D a CTA computes, the boxes of L, R and C that
// it takes, the step of the product, and the end: D = scale L R + add C, rounded and stored.
//
// A ring slot holds four boxes of 64 x 64 elements, 32 KB: L's 128 rows x 64 of K, then R's 128
// columns x 64 of K (symmetric: 128 rows of L, K along them; otherwise 64 rows of R). C, 128 x 128,
// comes after the last step of K as one step more, and its slot is where D is put together: two
// tiles of 64 x 128, one of each warpgroup. Two warpgroups have 64 rows of the tile each, 64
// accumulators a thread.
#pragma once
#include "common/cuda/tile.cuh"
#include "mars/product.h"

namespace df::cuda {
constexpr int kBoxBytes = kProductBox * kProductBox * 2, kSlotBoxes = 4;
constexpr int kSlotBytes = kSlotBoxes * kBoxBytes;
constexpr int kProductThreads = 256;  // that multiply

struct ProductPlace {  // of the CTA's tile: its matrix, its first row and column
  int64_t matrix;
  int row, col;
};

// Symmetric: tiles on or above the diagonal, by columns. Otherwise by columns, too, within bands of
// 16 rows of tiles, so that CTAs that run together share rows of L and columns of R in the L2
// cache.
template <bool kSymmetric>
__device__ inline ProductPlace product_place(const Product& p) {
  const uint32_t tiles = uint32_t(product_tiles(p));
  const uint32_t matrix = blockIdx.x / tiles, tile = blockIdx.x % tiles;
  uint32_t row, col;
  if constexpr (kSymmetric) {
    const auto before = [](uint32_t j) { return uint64_t(j) * (j + 1) / 2; };  // column j
    col = uint32_t((sqrtf(8.0f * float(tile) + 1) - 1) * 0.5f);
    while (before(col) > tile) --col;
    while (before(col + 1) <= tile) ++col;
    row = tile - uint32_t(before(col));
  } else {
    constexpr uint32_t kBand = 16;
    const uint32_t rows = uint32_t((p.out.rows + kProductTile - 1) / kProductTile);
    const uint32_t cols = tiles / rows, first = tile / (kBand * cols) * kBand;
    const uint32_t height = min(kBand, rows - first), within = tile % (kBand * cols);
    row = first + within % height, col = within / height;
  }
  return {matrix, int(row) * kProductTile, int(col) * kProductTile};
}

struct ProductBox {
  bool right;  // of R, else of L
  int row, col;
};
// Box i of a step; that after the last one has C.
template <bool kSymmetric>
__device__ inline ProductBox product_box(const ProductPlace& at, int step, int steps, int i) {
  const int k = step * kProductBox, half = i % 2 * kProductBox;
  if (step == steps) return {!kSymmetric, at.row + i / 2 * kProductBox, at.col + half};
  if (i < 2) return {false, at.row + half, k};
  if (kSymmetric) return {true, at.col + half, k};
  return {true, k, at.col + half};
}
__device__ inline int product_steps(const Product& p) {
  return int((p.left.cols + kProductBox - 1) / kProductBox);
}

using ProductSums = Accumulator<kProductTile>;

// This warpgroup's part of a step.
template <class Mma, class E, bool kSymmetric>
__device__ inline void product_step(float (&c)[kProductTile / 8][4], uint32_t slot) {
  using Rows = Tile<E, kProductTile, kProductBox>;
  using Cols = Tile<E, kProductBox, kProductTile>;
  const auto left = Rows{slot}.along_k().from(threadIdx.x / 128 * 64, 0);
  const uint32_t second = slot + 2 * kBoxBytes;
  if constexpr (kSymmetric)
    Mma::template mma<kProductTile, kProductBox>(c, left, Rows{second}.along_k());
  else
    Mma::template mma<kProductTile, kProductBox>(c, left, Cols{second}.along_mn());
}

template <class E>
struct ProductStage {  // the 128 x 128 elements of a slot
  uint32_t slot;
  using Part = Tile<E, kProductTile / 2, kProductTile>;
  __device__ Part part(int warpgroup) const { return {slot + uint32_t(warpgroup) * Part::kBytes}; }
  __device__ uint32_t at(int row, int col) const { return part(row / 64).at(row % 64, col); }
  __device__ void put(int row, int col, uint32_t bits) const {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(at(row, col)), "h"(uint16_t(bits)) : "memory");
  }
};

// put(row, col, 16 bits) for this lane's elements.
template <class E, class Fn>
__device__ inline void each_element(const float (&c)[kProductTile / 8][4], Fn put) {
  const int first = threadIdx.x / 128 * 64;
#pragma unroll
  for (int n = 0; n < kProductTile / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t both = pack<E>(c[n][i], c[n][i + 1]);
      const int row = first + fragment_row(i), col = fragment_col(n, i);
      put(row, col, both);
      put(row, col + 1, both >> 16);
    }
}

template <class E>
__device__ inline void scale_and_add(const Product& p, const ProductStage<E>& stage,
                                     float (&c)[kProductTile / 8][4]) {
  const auto own = stage.part(threadIdx.x / 128);
#pragma unroll
  for (int n = 0; n < kProductTile / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      float2 x = {0, 0};
      if (p.add != 0) {
        uint32_t both;
        asm volatile("ld.shared.b32 %0, [%1];"
                     : "=r"(both)
                     : "r"(own.at(fragment_row(i), fragment_col(n, 0)))
                     : "memory");
        x = unpack<E>(both);
      }
      c[n][i] = p.scale * c[n][i] + p.add * x.x;
      c[n][i + 1] = p.scale * c[n][i + 1] + p.add * x.y;
    }
}

// The stage to D from (row, col) on, 16 bytes at once but where rows of D begin elsewhere, and at
// the end of a row.
template <class E>
__device__ inline void store_stage(const Product& p, const ProductStage<E>& stage, int64_t matrix,
                                   int row, int col) {
  const Matrices& d = p.out;
  E* to = static_cast<E*>(d.data) + matrix * d.batch + row * d.ld + col;
#pragma unroll
  for (int i = 0; i < kProductTile * kProductTile / 8 / kProductThreads; ++i) {
    const int unit = int(threadIdx.x) + i * kProductThreads;
    const int r = unit / (kProductTile / 8), first = unit % (kProductTile / 8) * 8;
    const int64_t left = d.cols - col - first;
    if (row + r >= d.rows || left <= 0) continue;
    union {
      uint4 bits;
      E e[8];
    } x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.bits.x), "=r"(x.bits.y), "=r"(x.bits.z), "=r"(x.bits.w)
                 : "r"(stage.at(r, first))
                 : "memory");
    E* at = to + r * d.ld + first;
    if (p.whole_vectors && left >= 8) {
      __stcg(reinterpret_cast<uint4*>(at), x.bits);
      continue;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < left) at[e] = x.e[e];
  }
}

// From the sums to D, and of a symmetric one to the tile across the diagonal. The slot holds C, or
// nothing that is needed. By kProductThreads threads.
template <class E, bool kSymmetric>
__device__ inline void product_finish(const Product& p, const ProductPlace& at, uint32_t slot,
                                      float (&c)[kProductTile / 8][4]) {
  const auto barrier = [] { named_barrier_sync(1, kProductThreads); };
  const ProductStage<E> stage{slot};
  scale_and_add<E>(p, stage, c);
  barrier();
  const bool diagonal = kSymmetric && at.row == at.col;
  if (diagonal)  // one half, twice: the order of additions below the diagonal may be another
    each_element<E>(c, [&](int row, int col, uint32_t bits) {
      if (row <= col) stage.put(row, col, bits);
      if (row < col) stage.put(col, row, bits);
    });
  else
    store_tile<kProductTile>(c, stage.part(threadIdx.x / 128));
  barrier();
  store_stage<E>(p, stage, at.matrix, at.row, at.col);
  if (!kSymmetric || diagonal) return;
  barrier();
  each_element<E>(c, [&](int row, int col, uint32_t bits) { stage.put(col, row, bits); });
  barrier();
  store_stage<E>(p, stage, at.matrix, at.col, at.row);
}
}  // namespace df::cuda
