// Element types on the device: conversions, 16-byte vectors, and elements of a type that is known
// at run time only (small inputs, where an instantiation for each type would cost more than it
// saves).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dtype.h"

namespace df::cuda {
__device__ inline float to_float(float x) {
  return x;
}
__device__ inline float to_float(bf16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}
__device__ inline float to_float(f16 x) {
  return __half2float(__ushort_as_half(x.bits));
}

__device__ inline void from_float(float x, float* out) {
  *out = x;
}
__device__ inline void from_float(float x, bf16* out) {
  out->bits = __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline void from_float(float x, f16* out) {
  out->bits = __half_as_ushort(__float2half_rn(x));
}

// kCount elements of global memory at once: one, or 128 bits on a 16-byte boundary. Cached in L2
// only: what is loaded this way is used once. (A plain access of a vector type reaches nvcc's
// optimizer as single words, which it does not join again in every compilation.)
template <int kCount, class E>
__device__ inline void load_vector(const E* p, float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    x[0] = to_float(*p);
  } else {
    union {
      uint4 bits;
      E e[kCount];
    } raw;
    static_assert(sizeof(raw) == 16);
    raw.bits = __ldcg(reinterpret_cast<const uint4*>(p));
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = to_float(raw.e[i]);
  }
}
template <int kCount, class E>
__device__ inline void store_vector(E* p, const float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    from_float(x[0], p);
  } else {
    union {
      uint4 bits;
      E e[kCount];
    } raw;
    static_assert(sizeof(raw) == 16);
#pragma unroll
    for (int i = 0; i < kCount; ++i) from_float(x[i], &raw.e[i]);
    __stcg(reinterpret_cast<uint4*>(p), raw.bits);
  }
}

// Four floats of shared memory, 128 bits on a 16-byte boundary.
__device__ inline void load_shared(const float* p, float (&x)[4]) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
               : "r"(address));
}

__device__ inline float load_any(const void* p, DType type, int64_t i) {
  switch (type) {
    case DType::f32: return static_cast<const float*>(p)[i];
    case DType::f64: return float(static_cast<const double*>(p)[i]);
    case DType::bf16: return to_float(static_cast<const bf16*>(p)[i]);
    default: return to_float(static_cast<const f16*>(p)[i]);
  }
}
__device__ inline void store_any(float x, void* p, DType type, int64_t i) {
  switch (type) {
    case DType::f32: return from_float(x, static_cast<float*>(p) + i);
    case DType::f64: static_cast<double*>(p)[i] = x; return;
    case DType::bf16: return from_float(x, static_cast<bf16*>(p) + i);
    default: return from_float(x, static_cast<f16*>(p) + i);
  }
}
}  // namespace df::cuda
