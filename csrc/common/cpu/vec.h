// Vectors as wide as the instruction set of this copy, on GCC's vector extension: arithmetic,
// comparisons and ?: work on them as they are. Everything lives in the namespace of the
// instruction set, so that the linker never merges two copies.
#pragma once
#include "common/dtype.h"

namespace df::cpu::DF_ISA {
#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

template <class T, int kBytes = kVecBytes>
struct VecOf {
  typedef T type __attribute__((vector_size(kBytes)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
constexpr int kLanes = kVecBytes / int(sizeof(T));

template <class T>
constexpr int64_t round_up(int64_t n) {  // to whole vectors
  return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
inline Vec<T> splat(T x) {
  return x - Vec<T>{};  // folds to a broadcast, as adding zero would not: -0 + 0 = 0
}
template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

template <class V>
inline V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V vmin(V a, V b) {
  return a < b ? a : b;
}

// Lanes are added in halves, always in the same order.
template <class T, int kBytes = kVecBytes>
inline T sum(typename VecOf<T, kBytes>::type v) {
  constexpr int kHalf = kBytes / 2;
  if constexpr (kHalf < 16) {
    T total = v[0];
    for (int i = 1; i < kBytes / int(sizeof(T)); ++i) total += v[i];
    return total;
  } else {
    struct Halves {
      typename VecOf<T, kHalf>::type low, high;
    };
    const Halves h = bit_cast<Halves>(v);
    return sum<T, kHalf>(h.low + h.high);
  }
}
}  // namespace df::cpu::DF_ISA
