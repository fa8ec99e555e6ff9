// Tiles of shared memory for tensor cores, and fragments of them in registers.
//
// A tile has kRows rows, a multiple of 8, and kCols columns. Columns lie in panels of 128 bytes (64
// elements of 16 bits, 32 floats), panel after panel, each kRows rows of 128 bytes. The eight
// 16-byte units of a row are permuted by a XOR with its number modulo 8, so that ldmatrix and the
// 64-bit loads of float fragments meet no bank twice; for 16 bits it is the 128-byte swizzle of TMA
// and wgmma. A tile starts on a multiple of 1024 bytes.
#pragma once
#include <type_traits>

#include "common/cuda/load.cuh"
#include "common/cuda/ptx.cuh"

namespace df::cuda {
template <class E>
inline constexpr int kPanelCols = 128 / int(sizeof(E));

// What the bytes of a row are permuted with, a XOR.
template <class E>
__device__ inline uint32_t permutation(uint32_t row) {
  row &= 7;
  if constexpr (sizeof(E) == 2) return row << 4;
  // floats: rows 0-3, rows 4-7, even and odd rows each get pairs of units that are apart
  const uint32_t half = row >> 2, pair = (row & 3) ^ half;
  return (2 * pair + half) << 4;
}
// Element (row, col) of a tile or a part of one, of which `first` is the first element without
// permutation. A sum in which the compiler sees what is constant: for a whole tile it has to know
// that the address ends in zeros.
template <class E>
__device__ inline uint32_t permuted(uint32_t first, uint32_t row, uint32_t col) {
  const uint32_t bytes = (first & 127) + col * uint32_t(sizeof(E));
  return (first & ~127u) + row * 128 + (bytes ^ permutation<E>(row));
}

// How a tile is read: its columns run along K of the product (rows are M or N), or its rows do.
enum class Major { k, mn };

// A tile, or a part of one: the address of its first element without permutation.
template <class E, Major kMajor>
struct Operand {
  uint32_t first;
  uint32_t panel;  // bytes from panel to panel
  // the part from (row, col) on; row a multiple of 8, col of 16 bytes. A part that does not start
  // with a panel must end with it.
  __device__ Operand from(int row, int col) const {
    return {first + uint32_t(row) * 128 + uint32_t(col / kPanelCols<E>) * panel +
                uint32_t(col % kPanelCols<E>) * uint32_t(sizeof(E)),
            panel};
  }
};

template <class E_, int kRows_, int kCols_>
struct Tile {
  using E = E_;
  static constexpr int kRows = kRows_, kCols = kCols_;
  static constexpr int kBytes = kRows * kCols * int(sizeof(E));
  static_assert(kRows % 8 == 0 && kCols % kPanelCols<E> == 0);
  uint32_t base;  // a multiple of 1024

  __device__ uint32_t at(int row, int col) const {
    constexpr int kPanel = kPanelCols<E>;
    return base + uint32_t(col / kPanel) * (kRows * 128) + uint32_t(row) * 128 +
           (uint32_t(col % kPanel) * uint32_t(sizeof(E)) ^ permutation<E>(row));
  }
  __device__ Operand<E, Major::k> along_k() const { return {base, kRows * 128}; }
  __device__ Operand<E, Major::mn> along_mn() const { return {base, kRows * 128}; }
};

__device__ inline float4 load_shared4(uint32_t from) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(from)
               : "memory");
  return x;
}

// Two neighbouring numbers as one register of 16-bit elements, the first in the low half.
template <class E>
__device__ inline uint32_t pack(float first, float second) {
  uint32_t both;
  if constexpr (std::is_same_v<E, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
  return both;
}
template <class E>
__device__ inline float2 unpack(uint32_t both) {
  return {to_float(E{uint16_t(both)}), to_float(E{uint16_t(both >> 16)})};
}

// threadIdx.x, read anew: what is computed from it is not kept in registers from one round of a
// loop to the next.
__device__ inline int thread_anew() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  __builtin_assume(x >= 0);
  return x;
}
__device__ inline int anew(int x) {  // likewise
  asm volatile("" : "+r"(x));
  return x;
}

// An accumulator: 16 rows a warp, kN columns. Lane (g, t) = (lane / 4, lane % 4) has of tile n of 8
// columns: [n][0], [n][1] row g, columns 8 n + 2 t and + 1; [n][2], [n][3] row g + 8. A warpgroup's
// warps have 64 rows one below the other. It is the layout of mma.sync and of wgmma.
template <int kN>
using Accumulator = float[kN / 8][4];

// The operand A from registers: 16 rows a warp, kK columns, in the order of an accumulator.
template <class E, int kK>
struct Fragment {
  uint32_t r[kK / 16][4];  // as mma.m16n8k16 wants them
};
template <int kK>
struct Fragment<float, kK> {
  float r[kK / 8][4];
};

template <int kN>
__device__ inline void clear(Accumulator<kN>& c) {
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] = 0;
}

template <class E, int kK>
__device__ inline void to_fragment(const float (&c)[kK / 8][4], Fragment<E, kK>& a) {
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int k = 0; k < kK / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a.r[k][i] = pack<E>(c[2 * k + i / 2][i % 2 * 2], c[2 * k + i / 2][i % 2 * 2 + 1]);
  } else {
#pragma unroll
    for (int k = 0; k < kK / 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a.r[k][i] = c[k][i];
  }
}

// c as the sum of two fragments: what `to_fragment` keeps of it, and what that leaves. 16 bits
// only.
template <class E, int kK>
__device__ inline void split_fragment(const float (&c)[kK / 8][4], Fragment<E, kK>& high,
                                      Fragment<E, kK>& low) {
  to_fragment(c, high);
#pragma unroll
  for (int k = 0; k < kK / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 kept = unpack<E>(high.r[k][i]);
      low.r[k][i] =
          pack<E>(c[2 * k + i / 2][i % 2 * 2] - kept.x, c[2 * k + i / 2][i % 2 * 2 + 1] - kept.y);
    }
}

// Where this lane's elements of an accumulator stand in its 64 rows and kN columns.
__device__ inline int fragment_row(int i) {  // i: 0 to 3
  return threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + i / 2 * 8;
}
__device__ inline int fragment_col(int n, int i) {
  return 8 * n + threadIdx.x % 4 * 2 + i % 2;
}

// An accumulator to the first kN columns of a tile of 64 rows, rounded to its type.
template <int kN, class T>
__device__ inline void store_tile(const float (&c)[kN / 8][4], const T& tile) {
  using E = typename T::E;
  const int thread = thread_anew(), row = thread % 128 / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t to = tile.at(row + 8 * half, 8 * n + thread % 4 * 2);
      if constexpr (sizeof(E) == 2)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to),
                     "r"(pack<E>(c[n][2 * half], c[n][2 * half + 1]))
                     : "memory");
      else
        asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(c[n][2 * half]),
                     "f"(c[n][2 * half + 1])
                     : "memory");
    }
}
}  // namespace df::cuda
