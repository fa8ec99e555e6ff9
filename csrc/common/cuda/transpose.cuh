// Accumulators to shared memory the other way round: their columns become rows.
#pragma once
#include "common/cuda/tile.cuh"

namespace df::cuda {
// 8 x 8 elements of 16 bits in a warp, transposed: lane (g, t) has elements 2 t and 2 t + 1 of row
// g, before and after.
__device__ inline uint32_t transpose8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Four such matrices m to the 8 x 8 at (row + m / 2 * 8, col + m % 2 * 8) of a tile, transposed.
template <class T>
__device__ inline void store_block_transposed(const uint32_t (&x)[4], const T& tile, int row,
                                              int col) {
  const int lane = thread_anew() % 32;
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   tile.at(row + lane / 16 * 8 + lane % 8, col + lane / 8 % 2 * 8)),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
#else
#pragma unroll
  for (int m = 0; m < 4; ++m)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(
                     tile.at(row + m / 2 * 8 + lane / 4, col + m % 2 * 8 + lane % 4 * 2)),
                 "r"(transpose8(x[m]))
                 : "memory");
#endif
}

// 64 rows by kN columns to kN rows of a tile, columns [first_col, first_col + 64). Each warp writes
// the 16 columns that are its rows.
template <int kN, class T>
__device__ inline void store_transposed(const float (&c)[kN / 8][4], const T& tile, int first_col) {
  using E = typename T::E;
  const int thread = thread_anew(), lane = thread % 32;
  const int col = first_col + thread % 128 / 32 * 16;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
    if constexpr (sizeof(E) == 4) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        asm volatile("st.shared.f32 [%0], %1;" ::"r"(
                         tile.at(8 * n + lane % 4 * 2 + i % 2, col + lane / 4 + i / 2 * 8)),
                     "f"(c[n][i])
                     : "memory");
    } else {
      const uint32_t low = pack<E>(c[n][0], c[n][1]), high = pack<E>(c[n][2], c[n][3]);
#if __CUDA_ARCH__ >= 900
      asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(
                       tile.at(8 * n + lane % 8, col + lane / 8 % 2 * 8)),
                   "r"(low), "r"(high)
                   : "memory");
#else
      const uint32_t halves[2] = {low, high};
#pragma unroll
      for (int half = 0; half < 2; ++half)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(
                         tile.at(8 * n + lane / 4, col + 8 * half + lane % 4 * 2)),
                     "r"(transpose8(halves[half]))
                     : "memory");
#endif
    }
  }
}
}  // namespace df::cuda
