// Elementary functions on vectors of float and double. Largest error measured against float64
// (mpmath for double) over the domain: see tests/test_common.py for the enforced bounds.
//   exp       float 1.5 ulp, double 2 ulp; 0 below the least subnormal, inf above the largest
//   number log       float 2 ulp, double 2 ulp; normal positive arguments; log(0) = -inf sigmoid,
//   silu, softplus   float 4 ulp, double 4 ulp; softplus(x) = x above 20
// NaN in, NaN out.
#pragma once
#include "common/cpu/vec.h"

namespace df::cpu::DF_ISA {
template <class T>
struct Bits;  // integer type, mantissa width and exponent bias
template <>
struct Bits<float> {
  using I = int32_t;
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct Bits<double> {
  using I = int64_t;
  static constexpr int kMantissa = 52, kBias = 1023;
};

template <class T, int n>
inline Vec<T> horner(Vec<T> x, const T (&c)[n]) {  // c[0] x^(n-1) + ... + c[n-1]
  Vec<T> y = splat(c[0]);
  for (int i = 1; i < n; ++i) y = y * x + c[i];
  return y;
}

template <class T>
inline Vec<T> pow2(Vec<typename Bits<T>::I> n) {  // 2^n for normal results
  return bit_cast<Vec<T>>(Vec<typename Bits<T>::I>((n + Bits<T>::kBias) << Bits<T>::kMantissa));
}

// Correctly rounded; the compiler makes one instruction of the loop.
template <class T>
inline Vec<T> sqrt(Vec<T> x) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i)
    x[i] = sizeof(T) == 4 ? T(__builtin_sqrtf(x[i])) : T(__builtin_sqrt(x[i]));
  return x;
}

// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor series; 2^n in two factors, so that
// subnormal results are rounded once.
template <class T>
inline Vec<T> exp(Vec<T> x) {
  constexpr bool kFloat = sizeof(T) == 4;
  constexpr T kHigh = kFloat ? T(88.8) : T(709.8), kLow = kFloat ? T(-104) : T(-745.2);
  constexpr T kLn2Hi = kFloat ? T(0.693145752f) : T(0.6931471803691238);
  constexpr T kLn2Lo = kFloat ? T(1.42860677e-6f) : T(1.9082149292705877e-10);
  const Vec<T> clamped = vmin(vmax(x, splat(kLow)), splat(kHigh));
  // adding 1.5 * 2^mantissa rounds to an integer, which stands in the low bits
  constexpr T kRound = kFloat ? T(0x1.8p23) : T(0x1.8p52);
  const Vec<T> shifted = clamped * T(1.4426950408889634) + kRound;
  const auto n = bit_cast<Vec<typename Bits<T>::I>>(shifted) -
                 bit_cast<Vec<typename Bits<T>::I>>(splat(kRound));
  const Vec<T> fn = shifted - kRound;
  const Vec<T> r = (clamped - fn * kLn2Hi) - fn * kLn2Lo;
  Vec<T> p;
  if constexpr (kFloat) {
    constexpr T c[] = {T(1. / 5040), T(1. / 720), T(1. / 120), T(1. / 24), T(1. / 6), T(.5)};
    p = horner<T>(r, c);
  } else {
    constexpr T c[] = {T(1. / 6227020800), T(1. / 479001600), T(1. / 39916800), T(1. / 3628800),
                       T(1. / 362880),     T(1. / 40320),     T(1. / 5040),     T(1. / 720),
                       T(1. / 120),        T(1. / 24),        T(1. / 6),        T(.5)};
    p = horner<T>(r, c);
  }
  const Vec<T> e = p * r * r + r + T(1);
  const auto half = n >> 1;
  const Vec<T> y = e * pow2<T>(half) * pow2<T>(n - half);
  return x != x ? x : y;
}

// x = 2^n m with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s), s = (m - 1) / (m + 1).
template <class T>
inline Vec<T> log(Vec<T> x) {
  using I = typename Bits<T>::I;
  const I sqrt_half = bit_cast<I>(T(0.70710678118654752));
  const Vec<I> bits = bit_cast<Vec<I>>(x);
  const Vec<I> n = (bits - sqrt_half) >> Bits<T>::kMantissa;
  const Vec<T> m = bit_cast<Vec<T>>(Vec<I>(bits - (n << Bits<T>::kMantissa)));
  const Vec<T> f = m - T(1), s = f / (m + T(1)), z = s * s;
  Vec<T> p;
  if constexpr (sizeof(T) == 4) {
    constexpr T c[] = {T(2. / 11), T(2. / 9), T(2. / 7), T(2. / 5), T(2. / 3)};
    p = horner<T>(z, c);
  } else {
    constexpr T c[] = {T(2. / 23), T(2. / 21), T(2. / 19), T(2. / 17), T(2. / 15), T(2. / 13),
                       T(2. / 11), T(2. / 9),  T(2. / 7),  T(2. / 5),  T(2. / 3)};
    p = horner<T>(z, c);
  }
  // log m = f - s (f - z p): f is exact, so only small terms are rounded
  const Vec<T> fn = __builtin_convertvector(n, Vec<T>);
  constexpr T kLn2Hi = sizeof(T) == 4 ? T(0.693145752f) : T(0.6931471803691238);
  constexpr T kLn2Lo = sizeof(T) == 4 ? T(1.42860677e-6f) : T(1.9082149292705877e-10);
  const Vec<T> y = fn * kLn2Hi + (f - (s * (f - z * p) - fn * kLn2Lo));
  const Vec<T> infinity = splat(T(__builtin_inf()));
  const Vec<T> positive = x == infinity ? x : y;
  return x > T(0) ? positive : (x == T(0) ? -infinity : splat(T(__builtin_nan(""))));
}

// Of one number: 0 and 1 for large ones, with full relative precision on both sides.
inline double logistic(double x) {
  return 1 / (1 + __builtin_exp(-x));
}
template <class T>
inline Vec<T> sigmoid(Vec<T> x) {
  return T(1) / (T(1) + exp<T>(-x));
}
template <class T>
inline Vec<T> silu(Vec<T> x) {
  return x / (T(1) + exp<T>(-x));
}
// log(1 + e^x); the second term is what rounding 1 + e^x lost.
template <class T>
inline Vec<T> softplus(Vec<T> x) {
  const Vec<T> e = exp<T>(x), u = T(1) + e;
  const Vec<T> y = log<T>(u) + (e - (u - T(1))) / u;
  return x > T(20) ? x : y;
}
}  // namespace df::cpu::DF_ISA
