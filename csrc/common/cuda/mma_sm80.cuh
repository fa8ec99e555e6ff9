// Products of tiles on mma.sync, for a warpgroup (4 warps, 64 rows): C[64, N] += A[64, K] B[K, N]
// with A from registers or shared memory and B from shared memory, either way round. 16-bit types
// multiply as they are; floats as three products of TF32 (high high + high low + low high, error
// 2^-21 of the operands). `Sm80` and `Sm90` (mma_sm90.cuh) have the same members: kernels are
// written once for both.
#pragma once
#include "common/cuda/tile.cuh"

namespace df::cuda {
namespace sm80 {
template <bool kTransposed>
__device__ inline void ldmatrix4(uint32_t (&r)[4], uint32_t address) {
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ inline float2 load_two(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
__device__ inline float load_one(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

// Elements (mn, k) and (mn, k + 1) of an operand of floats.
template <Major kMajor>
__device__ inline float2 load_pair(Operand<float, kMajor> x, int mn, int k) {
  if constexpr (kMajor == Major::k) {
    const auto at = x.from(0, k);
    return load_two(permuted<float>(at.first, mn, 0));
  } else {
    const auto at = x.from(0, mn);
    return {load_one(permuted<float>(at.first, k, 0)),
            load_one(permuted<float>(at.first, k + 1, 0))};
  }
}

// Element (0, 0) of lane's row of the four 8 x 8 matrices of a 16 (mn) x 16 (k) block. Matrices in
// the order of B: mn outer, k inner; of A: k outer, mn inner.
template <bool kIsA, class E, Major kMajor>
__device__ inline uint32_t block_address(Operand<E, kMajor> x, int mn, int k) {
  const int lane = threadIdx.x % 32, inner = lane / 8 % 2 * 8, outer = lane / 16 * 8;
  if constexpr (kMajor == Major::k) {  // rows of the tile are mn
    const int row = lane % 8 + (kIsA ? inner : outer), col = k + (kIsA ? outer : inner);
    return permuted<E>(x.from(0, col).first, mn + row, 0);
  } else {
    const int row = lane % 8 + (kIsA ? outer : inner), col = mn + (kIsA ? inner : outer);
    return permuted<E>(x.from(0, col).first, k + row, 0);
  }
}

template <class E>
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<E, bf16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                     uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, "
      "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void split_tf32(float x, uint32_t& high, uint32_t& low) {
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(x));
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(x - __uint_as_float(high)));
}

// The k of a float product may come in any order, as long as both operands agree: the lanes' k = t
// and t + 4 of an mma are the columns 2 t and 2 t + 1 that a lane of an accumulator has.
template <int kN, Major kMajor>
__device__ inline void multiply_step(float (&c)[kN / 8][4], const float (&a)[4],
                                     Operand<float, kMajor> b, int k) {
  uint32_t high[4], low[4];
  split_tf32(a[0], high[0], low[0]), split_tf32(a[2], high[1], low[1]);
  split_tf32(a[1], high[2], low[2]), split_tf32(a[3], high[3], low[3]);
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < kN / 8; ++n) {
    const float2 x = load_pair(b, 8 * n + g, k + 2 * t);
    uint32_t high0, high1, low0, low1;
    split_tf32(x.x, high0, low0), split_tf32(x.y, high1, low1);
    multiply_tf32(c[n], low, high0, high1);
    multiply_tf32(c[n], high, low0, low1);
    multiply_tf32(c[n], high, high0, high1);
  }
}
}  // namespace sm80

// This lane's part of 64 rows (this warp's 16 of them) and kK columns of an operand A.
template <int kK, class E, Major kMajor>
__device__ inline void load_fragment(Fragment<E, kK>& a, Operand<E, kMajor> from) {
  const int row = threadIdx.x % 128 / 32 * 16;
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int k = 0; k < kK / 16; ++k)
      sm80::ldmatrix4<kMajor == Major::mn>(a.r[k], sm80::block_address<true>(from, row, 16 * k));
  } else {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < kK / 8; ++k) {
      const float2 x = sm80::load_pair(from, row + g, 8 * k + 2 * t);
      const float2 y = sm80::load_pair(from, row + g + 8, 8 * k + 2 * t);
      a.r[k][0] = x.x, a.r[k][1] = x.y, a.r[k][2] = y.x, a.r[k][3] = y.y;
    }
  }
}

struct Sm80 {
  static constexpr bool kAsync = false;

  // C += A B, A from registers.
  template <int kN, int kK, class E, Major kMajor>
  __device__ static void mma(float (&c)[kN / 8][4], const Fragment<E, kK>& a,
                             Operand<E, kMajor> b) {
    if constexpr (sizeof(E) == 2) {
#pragma unroll
      for (int k = 0; k < kK / 16; ++k)
#pragma unroll
        for (int n = 0; n < kN / 16; ++n) {
          uint32_t r[4];
          sm80::ldmatrix4<kMajor == Major::mn>(r, sm80::block_address<false>(b, 16 * n, 16 * k));
          sm80::multiply<E>(c[2 * n], a.r[k], r[0], r[1]);
          sm80::multiply<E>(c[2 * n + 1], a.r[k], r[2], r[3]);
        }
    } else {
#pragma unroll
      for (int k = 0; k < kK / 8; ++k) sm80::multiply_step<kN>(c, a.r[k], b, 8 * k);
    }
  }
  // C += A B, A of 64 rows from shared memory.
  template <int kN, int kK, class E, Major kMajorA, Major kMajorB>
  __device__ static void mma(float (&c)[kN / 8][4], Operand<E, kMajorA> a, Operand<E, kMajorB> b) {
    constexpr int kStep = sizeof(E) == 2 ? 16 : 8;
#pragma unroll
    for (int k = 0; k < kK; k += kStep) {
      Fragment<E, kStep> step;
      const bool along = kMajorA == Major::k;
      load_fragment<kStep>(step, a.from(along ? 0 : k, along ? k : 0));
      const bool along_b = kMajorB == Major::k;
      mma<kN>(c, step, b.from(along_b ? 0 : k, along_b ? k : 0));
    }
  }
  // Around products: nothing is asynchronous here.
  template <class... Accumulators>
  __device__ static void begin(Accumulators&...) {}
  __device__ static void commit() {}
  template <int kLeft, class... Accumulators>
  __device__ static void wait(Accumulators&...) {}
  __device__ static void stores_visible() {}  // to products; a barrier is needed besides
};
}  // namespace df::cuda
