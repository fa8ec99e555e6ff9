// Products of tiles on wgmma (sm_90a): the members of Sm80 (mma_sm80.cuh) for 16-bit types, issued
// asynchronously. Registers in flight may not be touched:
//   begin(c...); mma<N, K>(c, a, b); ...; commit(); ...; wait<0>(c...);
// Tiles are in the 128-byte swizzle, so that one descriptor form serves both ways round: along K,
// the groups of 8 rows are 1024 bytes apart; along M or N, these are groups of K, and panels of 64
// columns follow each other at the tile's own distance.
#pragma once
#include "common/cuda/tile.cuh"

namespace df::cuda {
namespace sm90 {
template <class E, Major kMajor>
__device__ inline uint64_t descriptor(Operand<E, kMajor> x) {
  const auto field = [](uint32_t bytes) { return uint64_t(bytes >> 4 & 0x3fff); };
  const uint32_t panel = kMajor == Major::mn ? x.panel : 16;
  return field(x.first) | field(panel) << 16 | field(1024) << 32 | uint64_t(1) << 62;
}

#define DF_TILE(t) "+f"(t[0]), "+f"(t[1]), "+f"(t[2]), "+f"(t[3])
template <class E, int kTransposedB>
__device__ inline void multiply_rs(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<E, bf16>)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
        : DF_TILE(c[0]), DF_TILE(c[1]), DF_TILE(c[2]), DF_TILE(c[3]), DF_TILE(c[4]), DF_TILE(c[5]),
          DF_TILE(c[6]), DF_TILE(c[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposedB));
  else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, 1, 1, 1, %37;"
        : DF_TILE(c[0]), DF_TILE(c[1]), DF_TILE(c[2]), DF_TILE(c[3]), DF_TILE(c[4]), DF_TILE(c[5]),
          DF_TILE(c[6]), DF_TILE(c[7])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposedB));
}

template <class E, int kTransposedA, int kTransposedB>
__device__ inline void multiply_ss(float (&c)[8][4], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<E, bf16>)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, %34, %35;"
        : DF_TILE(c[0]), DF_TILE(c[1]), DF_TILE(c[2]), DF_TILE(c[3]), DF_TILE(c[4]), DF_TILE(c[5]),
          DF_TILE(c[6]), DF_TILE(c[7])
        : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));
  else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "%32, %33, 1, 1, 1, %34, %35;"
        : DF_TILE(c[0]), DF_TILE(c[1]), DF_TILE(c[2]), DF_TILE(c[3]), DF_TILE(c[4]), DF_TILE(c[5]),
          DF_TILE(c[6]), DF_TILE(c[7])
        : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));
}

template <class E, int kTransposedB>
__device__ inline void multiply_rs(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
  if constexpr (std::is_same_v<E, bf16>)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
        : DF_TILE(c[0]), DF_TILE(c[1]), DF_TILE(c[2]), DF_TILE(c[3]), DF_TILE(c[4]), DF_TILE(c[5]),
          DF_TILE(c[6]), DF_TILE(c[7]), DF_TILE(c[8]), DF_TILE(c[9]), DF_TILE(c[10]),
          DF_TILE(c[11]), DF_TILE(c[12]), DF_TILE(c[13]), DF_TILE(c[14]), DF_TILE(c[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposedB));
  else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, 1, 1, 1, %69;"
        : DF_TILE(c[0]), DF_TILE(c[1]), DF_TILE(c[2]), DF_TILE(c[3]), DF_TILE(c[4]), DF_TILE(c[5]),
          DF_TILE(c[6]), DF_TILE(c[7]), DF_TILE(c[8]), DF_TILE(c[9]), DF_TILE(c[10]),
          DF_TILE(c[11]), DF_TILE(c[12]), DF_TILE(c[13]), DF_TILE(c[14]), DF_TILE(c[15])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kTransposedB));
}

template <class E, int kTransposedA, int kTransposedB>
__device__ inline void multiply_ss(float (&c)[16][4], uint64_t a, uint64_t b) {
  if constexpr (std::is_same_v<E, bf16>)
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, %66, %67;"
        : DF_TILE(c[0]), DF_TILE(c[1]), DF_TILE(c[2]), DF_TILE(c[3]), DF_TILE(c[4]), DF_TILE(c[5]),
          DF_TILE(c[6]), DF_TILE(c[7]), DF_TILE(c[8]), DF_TILE(c[9]), DF_TILE(c[10]),
          DF_TILE(c[11]), DF_TILE(c[12]), DF_TILE(c[13]), DF_TILE(c[14]), DF_TILE(c[15])
        : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));
  else
    asm volatile(
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "%64, %65, 1, 1, 1, %66, %67;"
        : DF_TILE(c[0]), DF_TILE(c[1]), DF_TILE(c[2]), DF_TILE(c[3]), DF_TILE(c[4]), DF_TILE(c[5]),
          DF_TILE(c[6]), DF_TILE(c[7]), DF_TILE(c[8]), DF_TILE(c[9]), DF_TILE(c[10]),
          DF_TILE(c[11]), DF_TILE(c[12]), DF_TILE(c[13]), DF_TILE(c[14]), DF_TILE(c[15])
        : "l"(a), "l"(b), "n"(kTransposedA), "n"(kTransposedB));
}
#undef DF_TILE

// Keeps the compiler from moving accesses of registers across a point of the asynchronous order.
template <int kN>
__device__ inline void pin(float (&c)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[n][i])::"memory");
}
template <class E, int kK>
__device__ inline void pin(Fragment<E, kK>& a) {
#pragma unroll
  for (int k = 0; k < kK / 16; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a.r[k][i])::"memory");
}

// fn(tile of kWidth columns of c, its first column), for all columns: 128 at once while there are.
template <int kN, int kFirst = 0, class Fn>
__device__ inline void by_columns(float (&c)[kN / 8][4], Fn fn) {
  if constexpr (kFirst < kN) {
    constexpr int kWidth = kN - kFirst >= 128 ? 128 : 64;
    static_assert((kN - kFirst) % 64 == 0);
    fn(reinterpret_cast<float(&)[kWidth / 8][4]>(c[kFirst / 8]), kFirst);
    by_columns<kN, kFirst + kWidth>(c, fn);
  }
}
// The descriptor of the part of an operand from (mn, k) on, from that of the whole: a constant
// more.
template <class E, Major kMajor>
__device__ inline uint64_t part(Operand<E, kMajor> x, uint64_t whole, int mn, int k) {
  const auto from = kMajor == Major::k ? x.from(mn, k) : x.from(k, mn);
  const uint32_t low = uint32_t(whole) + ((from.first - x.first) >> 4);
  return (whole & ~0xffffffffull) | low;
}
}  // namespace sm90

struct Sm90 {
  static constexpr bool kAsync = true;

  template <int kN, int kK, class E, Major kMajor>
  __device__ static void mma(float (&c)[kN / 8][4], const Fragment<E, kK>& a,
                             Operand<E, kMajor> b) {
    const uint64_t whole = sm90::descriptor(b);
#pragma unroll
    for (int k = 0; k < kK / 16; ++k)
      sm90::by_columns<kN>(c, [&](auto& tile, int n) {
        sm90::multiply_rs<E, kMajor == Major::mn>(tile, a.r[k], sm90::part(b, whole, n, 16 * k));
      });
  }
  template <int kN, int kK, class E, Major kMajorA, Major kMajorB>
  __device__ static void mma(float (&c)[kN / 8][4], Operand<E, kMajorA> a, Operand<E, kMajorB> b) {
    const uint64_t of_a = sm90::descriptor(a), of_b = sm90::descriptor(b);
#pragma unroll
    for (int k = 0; k < kK / 16; ++k)
      sm90::by_columns<kN>(c, [&](auto& tile, int n) {
        sm90::multiply_ss<E, kMajorA == Major::mn, kMajorB == Major::mn>(
            tile, sm90::part(a, of_a, 0, 16 * k), sm90::part(b, of_b, n, 16 * k));
      });
  }
  template <class... Registers>
  __device__ static void begin(Registers&... c) {
    (sm90::pin(c), ...);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  }
  __device__ static void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  // Until at most kLeft groups are in flight; c: what the finished ones wrote or read.
  template <int kLeft, class... Registers>
  __device__ static void wait(Registers&... c) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
    (sm90::pin(c), ...);
  }
  __device__ static void stores_visible() {
#if __CUDA_ARCH__ >= 900
    fence_async_proxy();
#endif
  }
};
}  // namespace df::cuda
