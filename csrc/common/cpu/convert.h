// Element types to compute types and back, one value or one vector at a time. Integer arithmetic
// only, so that every instruction set has the same bits: round to nearest even, NaN stays NaN.
#pragma once
#include "common/cpu/vec.h"

namespace df::cpu::DF_ISA {
using U32 = Vec<uint32_t>;
using U16Half = typename VecOf<uint16_t, kVecBytes / 2>::type;  // as many lanes as Vec<float>

// U is U32 or uint32_t, F the float type of the same shape.
template <class F, class U>
inline F bf16_to_float(U bits) {
  return bit_cast<F>(U(bits << 16));
}
template <class U, class F>
inline U float_to_bf16(F x) {
  const U u = bit_cast<U>(x);
  const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  return x != x ? U((u >> 16) | 0x40) : rounded;
}
// A half's exponent and mantissa, moved to a float's place, are 2^112 too small. The product
// restores the scale and is exact, subnormals included; all-ones exponents need the float's.
template <class F, class U>
inline F f16_to_float(U bits) {
  const U magnitude = (bits & 0x7fff) << 13;
  const F scaled = bit_cast<F>(magnitude) * 0x1p112f;
  const U finite = bit_cast<U>(scaled);
  const U value = magnitude >= 0x0f800000 ? U(magnitude | 0x7f800000) : finite;
  return bit_cast<F>(U(value | ((bits & 0x8000) << 16)));
}
template <class U, class F>
inline U float_to_f16(F x) {
  const U u = bit_cast<U>(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
  const U normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
  // below 2^-14 the sum with 0.5 leaves the mantissa, rounded by the addition itself, in the low
  // bits
  const U subnormal = bit_cast<U>(F(bit_cast<F>(a) + 0.5f)) - 0x3f000000;
  const U finite = a < 0x38800000 ? subnormal : normal;
  const U overflow =
      a > 0x7f800000 ? U((a >> 13) | 0x7e00) & U(a | 0x7fff) & 0x7fff : U(a & 0) + 0x7c00;
  return sign | (a >= 0x477ff000 ? overflow : finite);
}

inline float to_compute(float x) {
  return x;
}
inline double to_compute(double x) {
  return x;
}
inline float to_compute(bf16 x) {
  return bf16_to_float<float>(uint32_t(x.bits));
}
inline float to_compute(f16 x) {
  return f16_to_float<float>(uint32_t(x.bits));
}

inline void from_compute(float x, float* out) {
  *out = x;
}
inline void from_compute(double x, double* out) {
  *out = x;
}
inline void from_compute(float x, bf16* out) {
  out->bits = float_to_bf16<uint32_t>(x);
}
inline void from_compute(float x, f16* out) {
  out->bits = float_to_f16<uint32_t>(x);
}

inline Vec<float> load_compute(const float* p) {
  return load(p);
}
inline Vec<double> load_compute(const double* p) {
  return load(p);
}
template <class Half>
inline U32 load_bits(const Half* p) {
  U16Half h;
  __builtin_memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, U32);
}
inline Vec<float> load_compute(const bf16* p) {
  return bf16_to_float<Vec<float>>(load_bits(p));
}
inline Vec<float> load_compute(const f16* p) {
  return f16_to_float<Vec<float>>(load_bits(p));
}

template <class Half>
inline void store_bits(U32 u, Half* p) {
  const U16Half h = __builtin_convertvector(u, U16Half);
  __builtin_memcpy(p, &h, sizeof(h));
}
inline void store_compute(Vec<float> x, float* p) {
  store(p, x);
}
inline void store_compute(Vec<double> x, double* p) {
  store(p, x);
}
inline void store_compute(Vec<float> x, bf16* p) {
  store_bits(float_to_bf16<U32>(x), p);
}
inline void store_compute(Vec<float> x, f16* p) {
  store_bits(float_to_f16<U32>(x), p);
}

// The same, and the values as they were stored.
inline Vec<float> store_rounded(Vec<float> x, bf16* p) {
  const U32 bits = float_to_bf16<U32>(x);
  store_bits(bits, p);
  return bf16_to_float<Vec<float>>(bits);
}
inline Vec<float> store_rounded(Vec<float> x, f16* p) {
  const U32 bits = float_to_f16<U32>(x);
  store_bits(bits, p);
  return f16_to_float<Vec<float>>(bits);
}

// n elements, n arbitrary; reads and writes nothing beyond them.
template <class T, class E>
inline void load_row(const E* from, T* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store(to + i, Vec<T>(load_compute(from + i)));
  for (; i < n; ++i) to[i] = to_compute(from[i]);
}
template <class T, class E>
inline void store_row(const T* from, E* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) store_compute(load(from + i), to + i);
  for (; i < n; ++i) from_compute(from[i], to + i);
}
}  // namespace df::cpu::DF_ISA
