// T' = (I + A)^-1 for a strictly lower triangular A = L diag(beta) of kC x kC, to fp32 accuracy:
// blocks of 16 on the diagonal by substitution, those below by
//   T'_ij = -T'_ii sum_{j <= m < i} A_im T'_mj                      (products of 3xTF32)
// in which every factor is bounded where T' is; powers of A are not. Warp w makes block column w,
// transposed, so that one product's result is the next one's operand in registers.
#pragma once
#include "common/cuda/mma_sm80.cuh"
#include "common/cuda/transpose.cuh"

namespace df::cuda {
// Block i of a block column of T', transposed, as an accumulator: [i][n][e] is T' at row
// 16 i + 8 n + 2 t + e % 2 and column g + 8 (e / 2) of the block column.
template <int kC>
using InverseColumn = float[kC / 16][2][4];

__device__ inline void load_shared4(uint32_t from, float (&x)[4]) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(from)
               : "memory");
}
__device__ inline void store_shared(uint32_t to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}

// The diagonal block `block` of A becomes that of T'; by one warp.
template <class T>
__device__ inline void invert_diagonal(const T& a, int block) {
  const int thread = thread_anew(), first = 16 * block, col = thread % 16;
  float x[16];
#pragma unroll
  for (int r = 0; r < 16; ++r) {
    if (r % 4 == 0) __syncwarp();  // or all rows are loaded at once, into as many registers
    x[r] = r == col;
#pragma unroll
    for (int j = 0; j < r; j += 4) {
      float row[4];
      load_shared4(a.at(first + r, first + j), row);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (j + e < r) x[r] -= row[e] * x[j + e];
    }
  }
  __syncwarp();
  if (thread % 32 < 16)
#pragma unroll
    for (int r = 0; r < 16; ++r) store_shared(a.at(first + r, first + col), x[r]);
}

// Block column w of T', from A below the diagonal blocks and T' in them; by one warp.
template <int kC>
__device__ inline void invert_column(const Tile<float, kC, kC>& a, int w, InverseColumn<kC>& x) {
  const int thread = thread_anew(), g = thread % 32 / 4, t = thread % 4;
  const auto blocks = [&](int row, int col) { return a.along_k().from(16 * row, 16 * col); };
#pragma unroll
  for (int i = 0; i < kC / 16; ++i) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        x[i][n][e] =
            i != w ? 0
                   : sm80::load_one(a.at(16 * w + 8 * n + 2 * t + e % 2, 16 * w + g + 8 * (e / 2)));
    if (i <= w) continue;
    float sum[2][4];
    clear<16>(sum);
#pragma unroll
    for (int m = 0; m < i; ++m)
      if (m >= w)
#pragma unroll
        for (int s = 0; s < 2; ++s) sm80::multiply_step<16>(sum, x[m][s], blocks(i, m), 8 * s);
#pragma unroll
    for (int s = 0; s < 2; ++s) sm80::multiply_step<16>(x[i], sum[s], blocks(i, i), 8 * s);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[i][n][e] = -x[i][n][e];
  }
}

// Block column w to a tile; for 16 bits to two, the second of which holds what the first leaves.
template <int kC, class E>
__device__ inline void store_inverse(const InverseColumn<kC>& x, int w, const Tile<E, kC, kC>& high,
                                     const Tile<E, kC, kC>& low) {
  const int thread = thread_anew(), g = thread % 32 / 4, t = thread % 4;
#pragma unroll
  for (int i = 0; i < kC / 16; ++i)
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float first = x[i][n][2 * half], second = x[i][n][2 * half + 1];
        const int row = 16 * i + 8 * n, col = 16 * w + 8 * half;
        if constexpr (sizeof(E) == 2) {
          const uint32_t both = pack<E>(first, second);
          const float2 kept = unpack<E>(both);
          const uint32_t rest = pack<E>(first - kept.x, second - kept.y);
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(high.at(row + g, col + 2 * t)),
                       "r"(transpose8(both))
                       : "memory");
          asm volatile("st.shared.b32 [%0], %1;" ::"r"(low.at(row + g, col + 2 * t)),
                       "r"(transpose8(rest))
                       : "memory");
        } else {
          store_shared(high.at(row + 2 * t, col + g), first);
          store_shared(high.at(row + 2 * t + 1, col + g), second);
        }
      }
}
}  // namespace df::cuda
