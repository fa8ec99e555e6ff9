// Elements of the inputs as they are in memory. To convert one is to wait for it, so that what a
// thread needs is requested as bits first.
#pragma once
#include "common/cuda/load.cuh"
#include "gated_delta/input.h"

namespace df::cuda {
template <class Word>
__device__ inline uint32_t bits_of(Word x) {
  if constexpr (sizeof(Word) > 4)
    return __float_as_uint(float(x));
  else
    return x;
}

template <class Source>  // Input or Dense
__device__ inline uint32_t input_bits(const Source& x, int64_t i) {
  if (x.dtype == DType::f64) return bits_of(static_cast<const double*>(x.data)[i]);
  return x.dtype == DType::f32 ? static_cast<const uint32_t*>(x.data)[i]
                               : static_cast<const uint16_t*>(x.data)[i];
}

// bits[n] <- element n kStep of p, where that is before `end`; else zero.
template <int kStep, class Word, int kCount>
__device__ inline void input_bits(const Word* p, int64_t end, uint32_t (&bits)[kCount]) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) bits[n] = n * kStep < end ? bits_of(p[n * kStep]) : 0;
}
template <int kStep, class Source, int kCount>
__device__ inline void input_bits(const Source& x, int64_t i, int64_t end,
                                  uint32_t (&bits)[kCount]) {
  if (x.dtype == DType::f64)
    input_bits<kStep>(static_cast<const double*>(x.data) + i, end, bits);
  else if (x.dtype == DType::f32)
    input_bits<kStep>(static_cast<const uint32_t*>(x.data) + i, end, bits);
  else
    input_bits<kStep>(static_cast<const uint16_t*>(x.data) + i, end, bits);
}

__device__ inline float from_input_bits(uint32_t bits, DType type) {  // without branches
  const float half = to_float(f16{static_cast<uint16_t>(bits)});
  const float other = __uint_as_float(type == DType::bf16 ? bits << 16 : bits);
  return type == DType::f16 ? half : other;
}
}  // namespace df::cuda
