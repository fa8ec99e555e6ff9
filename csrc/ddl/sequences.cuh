// Which sequence a token is in, and spans of several elements in one access.
#pragma once
#include "common/cuda/load.cuh"
#include "ddl/sequences.h"

namespace df::cuda {
struct Span {  // tokens [first, last) of a row; n == N: those behind the last sequence
  int64_t n, first, last;
};

__device__ inline int64_t offset_at(const Offsets& o, int64_t i) {
  const int64_t at = o.wide ? static_cast<const int64_t*>(o.data)[i]
                            : int64_t(static_cast<const int32_t*>(o.data)[i]);
  return at < 0 ? 0 : at < o.T ? at : o.T;  // whatever they say, no access leaves the row
}
__device__ inline Span sequence(const Offsets& o, int64_t n) {
  if (!o.data) return {n, 0, o.T};
  const int64_t first = offset_at(o, n), last = offset_at(o, n + 1);
  return {n, first, last < first ? first : last};
}
// The sequence that holds token t of row b; empty ones hold none.
__device__ inline Span span_of(const Offsets& o, int64_t b, int64_t t) {
  if (!o.data) return {b, 0, o.T};
  int64_t low = 0, high = o.N + 1;  // the first offset beyond t is in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    offset_at(o, middle) > t ? high = middle : low = middle + 1;
  }
  if (low == 0) return {o.N, 0, offset_at(o, 0)};  // only where the offsets do not start with 0
  return {low - 1, offset_at(o, low - 1), low > o.N ? o.T : offset_at(o, low)};
}

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

inline bool on_boundary(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}
}  // namespace df::cuda
