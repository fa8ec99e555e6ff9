// Spans of several elements in one access.
#pragma once
#include "common/cuda/load.cuh"

namespace df::cuda {
template <int kBytes>
struct WordOf {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = unsigned;
};
template <>
struct WordOf<2> {
  using type = unsigned short;
};

// kCount elements in registers as they are in memory. They go through L2 alone: each is used once.
template <class E, int kCount>
struct Pack {
  using Word = typename WordOf<kCount* int(sizeof(E))>::type;
  static constexpr int kWords = kCount * sizeof(E) / sizeof(Word);
  union {
    Word words[kWords];
    E elements[kCount];
  };
  __device__ void load(const E* p) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = __ldcg(reinterpret_cast<const Word*>(p) + i);
  }
  __device__ void store(E* p) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stcg(reinterpret_cast<Word*>(p) + i, words[i]);
  }
  __device__ void zero() {
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = Word{};
  }
  // The first `count` elements one by one, from any address; zeros are the others.
  __device__ void load_some(const E* p, int64_t count) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) elements[i] = i < count ? p[i] : E{};
  }
  __device__ void store_some(E* p, int64_t count) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      if (i < count) p[i] = elements[i];
  }
  __device__ float operator[](int i) const { return to_float(elements[i]); }
  __device__ void set(int i, float x) { from_float(x, elements + i); }
};

__host__ __device__ inline bool on_boundary(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}
}  // namespace df::cuda
