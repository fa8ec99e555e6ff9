// Stores past the caches, for large results that nobody reads soon: the line is not read first,
// and what the caches hold stays. Addresses are aligned to vectors; a worker ends with
// stream_end(), which makes its stores visible to the others.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "common/cpu/vec.h"

namespace df::cpu::DF_ISA {
template <class T>
inline void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(reinterpret_cast<float*>(p), __m512(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(reinterpret_cast<float*>(p), __m256(v));
#else
  store(p, v);
#endif
}
inline void stream_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
}  // namespace df::cpu::DF_ISA
