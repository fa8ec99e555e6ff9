// T' = (I + A)^-1 for a strictly lower triangular A = L diag(beta) of kC x kC. 32 x 32 by
// substitution, in place. 64 x 64, for 16-bit inputs: blocks of 16 on the diagonal by substitution,
// then twice the block below the diagonal of two neighbours, of 16 and of 32,
//   T'_21 = -T'_22 (A_21 T'_11)                                     (products of 3xTF32)
// in which every factor is bounded where T' is; powers of A are not. Blocks are transposed in
// registers, so that one product's result is the next one's operand.
#pragma once
#include "common/cuda/mma_sm80.cuh"
#include "common/cuda/transpose.cuh"

namespace df::cuda {
// A block of 16 x 16, transposed, as an accumulator: [n][e] is row 8 n + 2 t + e % 2 and column
// g + 8 (e / 2) of it.
using Block = float[2][4];

__device__ inline void store_shared(uint32_t to, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory");
}

// The diagonal block `block` of kN rows of A becomes that of T'; by one warp, a lane a column.
template <int kN, class T>
__device__ inline void invert_diagonal(const T& a, int block) {
  const int thread = thread_anew(), first = kN * block, col = thread % kN;
  float x[kN];
#pragma unroll
  for (int r = 0; r < kN; ++r) {
    if (r % 4 == 0) __syncwarp();  // or all rows are loaded at once, into as many registers
    x[r] = r == col;
#pragma unroll
    for (int j = 0; j < r; j += 4) {
      const float4 y = load_shared4(a.at(first + r, first + j));
      const float row[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (j + e < r) x[r] -= row[e] * x[j + e];
    }
  }
  __syncwarp();
  if (thread % 32 < kN)
#pragma unroll
    for (int r = 0; r < kN; ++r) store_shared(a.at(first + r, first + col), x[r]);
}

// fn(x[n][e], its address) for all of block (i, j).
template <class T, class X, class Fn>
__device__ inline void each_of_block(const T& a, int i, int j, X& x, Fn fn) {
  const int lane = thread_anew() % 32, row = 16 * i + lane % 4 * 2, col = 16 * j + lane / 4;
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) fn(x[n][e], a.at(row + 8 * n + e % 2, col + e / 2 * 8));
}
template <class T>
__device__ inline void load_block(const T& a, int i, int j, Block& x) {
  each_of_block(a, i, j, x, [](float& y, uint32_t at) { y = sm80::load_one(at); });
}
template <class T>
__device__ inline void store_block(const T& a, int i, int j, const Block& x) {
  each_of_block(a, i, j, x, [](float y, uint32_t at) { store_shared(at, y); });
}

// x as the sum of two numbers of 11 and 10 bits: the tensor cores ignore the low 13 of 24.
__device__ inline void cut_tf32(float x, uint32_t& high, uint32_t& low) {
  high = __float_as_uint(x) & 0xffffe000u;
  low = __float_as_uint(x - __uint_as_float(high)) & 0xffffe000u;
}
// A sum of products of blocks.
struct BlockSum {
  Block sum;
  __device__ BlockSum() : sum{} {}
  // (block x^T times block (i, m) of a^T)
  template <class T>
  __device__ void add(const Block& x, const T& a, int i, int m) {
    const int lane = thread_anew() % 32, row = 16 * i + lane / 4, col = 16 * m + lane % 4 * 2;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      uint32_t high[4], low[4];
      cut_tf32(x[s][0], high[0], low[0]), cut_tf32(x[s][2], high[1], low[1]);
      cut_tf32(x[s][1], high[2], low[2]), cut_tf32(x[s][3], high[3], low[3]);
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 y = sm80::load_two(a.at(row + 8 * n, col + 8 * s));
        uint32_t high0, high1, low0, low1;
        cut_tf32(y.x, high0, low0), cut_tf32(y.y, high1, low1);
        sm80::multiply_tf32(sum[n], low, high0, high1);
        sm80::multiply_tf32(sum[n], high, low0, low1);
        sm80::multiply_tf32(sum[n], high, high0, high1);
      }
    }
  }
  // factor times the sum
  __device__ void get(float factor, Block& x) const {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) x[n][e] = factor * sum[n][e];
  }
};

// T'_21 of the blocks of 16 number 2 w and 2 w + 1, by warps 0 and 1; into the place of A.
template <class T>
__device__ inline void join_blocks(const T& a, int w, Block& x) {
  BlockSum read, joined;
  load_block(a, 2 * w, 2 * w, x);
  read.add(x, a, 2 * w + 1, 2 * w);
  read.get(1, x);
  joined.add(x, a, 2 * w + 1, 2 * w + 1);
  joined.get(-1, x);
  __syncwarp();  // A there has been read
  store_block(a, 2 * w + 1, 2 * w, x);
}

// Where a lane leaves 4 numbers for the same lane of another warp: in a block above the diagonal.
template <class T>
__device__ inline uint32_t part_address(const T& a, int j, int n) {
  const int lane = thread_anew() % 32;
  return a.at(32 * j + lane % 16, 48 + lane / 16 * 8 + 4 * n);
}
// Block (i, j) = (2 + w / 2, w % 2) of T', of the lower left 32 x 32, by four warps:
//   M_ij = sum_m A_im T'_mj    T'_2j = -T'_22 M_2j    T'_3j = -T'_33 M_3j - T'_32 M_2j
// the last of which the warp of M_2j makes and leaves: a barrier, then take_part.
template <class T>
__device__ inline void join_pairs(const T& a, int w, Block& x) {
  const int i = 2 + w / 2, j = w % 2;
  BlockSum M, own;
#pragma unroll 1
  for (int m = j; m < 2; ++m) {
    load_block(a, m, j, x);
    M.add(x, a, i, m);
  }
  M.get(1, x);
  own.add(x, a, i, i);
  if (i == 2) {
    BlockSum below;
    below.add(x, a, 3, 2);
    below.get(-1, x);
#pragma unroll
    for (int n = 0; n < 2; ++n)
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(part_address(a, j, n)),
                   "f"(x[n][0]), "f"(x[n][1]), "f"(x[n][2]), "f"(x[n][3])
                   : "memory");
  }
  own.get(-1, x);
}
template <class T>
__device__ inline void take_part(const T& a, int w, Block& x) {
  if (w < 2) return;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    const float4 y = load_shared4(part_address(a, w % 2, n));
    x[n][0] += y.x, x[n][1] += y.y, x[n][2] += y.z, x[n][3] += y.w;
  }
}

// Block (i, j) to two tiles, the second of which holds what the first leaves.
template <class T>
__device__ inline void store_pair(const Block& x, int i, int j, const T& high, const T& low) {
  using E = typename T::E;
  uint32_t first[4], second[4];
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const float above = x[m / 2][m % 2 * 2], below = x[m / 2][m % 2 * 2 + 1];
    first[m] = pack<E>(above, below);
    const float2 kept = unpack<E>(first[m]);
    second[m] = pack<E>(above - kept.x, below - kept.y);
  }
  store_block_transposed(first, high, 16 * i, 16 * j);
  store_block_transposed(second, low, 16 * i, 16 * j);
}
// Zeros above the diagonal blocks; by 128 threads.
template <class T>
__device__ inline void clear_upper(const T& high, const T& low, int thread) {
  const int row = thread % T::kRows;
  for (int col = row / 16 * 16 + 16; col < T::kCols; col += 8)
    asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(
                     thread < T::kRows ? high.at(row, col) : low.at(row, col)),
                 "r"(0)
                 : "memory");
}

// T' of A in `a`, which each warp has filled its 16 rows of, as the pair of tiles of E that take
// its room; by four warps, which have a named barrier of their own. Warp 3 does aside.run()
// meanwhile. No barrier follows.
template <class E, class Aside>
__device__ inline void invert_square(const Tile<float, 64, 64>& a, int barrier, Aside& aside) {
  const int warp = thread_anew() % 128 / 32;
  __syncwarp();
  invert_diagonal<16>(a, warp);
  named_barrier_sync(barrier, 128);
  Block joined, x, own;
  if (warp < 2) join_blocks(a, warp, joined);
  if (warp == 3) aside.run();
  named_barrier_sync(barrier, 128);
  join_pairs(a, warp, x);
  load_block(a, warp, warp, own);
  named_barrier_sync(barrier, 128);
  take_part(a, warp, x);
  named_barrier_sync(barrier, 128);  // T' takes the room of A
  const Tile<E, 64, 64> high{a.base}, low{a.base + high.kBytes};
  if (warp < 2) store_pair(joined, 2 * warp + 1, 2 * warp, high, low);
  store_pair(x, 2 + warp / 2, warp % 2, high, low);
  store_pair(own, warp, warp, high, low);
  clear_upper(high, low, thread_anew() % 128);
}
}  // namespace df::cuda
