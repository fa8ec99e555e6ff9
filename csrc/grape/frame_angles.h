// Angles t theta on vectors of tokens, and the integral I(om, t) = int_0^t Rc(s om) ds.
#pragma once
#include "common/cpu/math.h"
#include "grape/frame_cpu.h"

namespace df::cpu::DF_ISA {
// a b + c, rounded once; the compiler makes one instruction of the loop where there is one.
inline Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes<double>; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
}

// (t theta mod 2 pi) / 2 in [-pi/2, pi/2]: the exact product in two parts, reduced by 2 pi in two
// parts. Error 1e-15 for |t theta| < 2^50; NaN beyond, where the angle has no digit left.
inline Vec<double> half_angle(Vec<double> t, double theta) {
  constexpr double kTurn = 6.283185307179586, kTurnLow = 2.4492935982947064e-16;
  constexpr double kRound = 0x1.8p52, kLargest = 0x1p50;
  const Vec<double> factor = splat(theta), high = t * factor, low = fused(t, factor, -high);
  const Vec<double> n = (high * (1 / kTurn) + kRound) - kRound;
  const Vec<double> rest = fused(-n, splat(kTurn), high);
  const Vec<double> angle = fused(-n, splat(kTurnLow), rest) + low;
  const Vec<double> size = high < 0 ? -high : high;
  return (size < kLargest ? angle : splat(__builtin_nan(""))) * 0.5;
}

// By their Taylor series, |x| <= pi/2: 1 ulp of 1. low: what rounding x lost.
template <class T>
struct SinCos {
  Vec<T> sin, cos;

  SinCos(Vec<T> x, Vec<T> low) {
    const Vec<T> z = x * x;
    if constexpr (sizeof(T) == 4) {
      constexpr T s[] = {T(1. / 6227020800), T(-1. / 39916800), T(1. / 362880),
                         T(-1. / 5040),      T(1. / 120),       T(-1. / 6)};
      constexpr T c[] = {T(-1. / 87178291200),
                         T(1. / 479001600),
                         T(-1. / 3628800),
                         T(1. / 40320),
                         T(-1. / 720),
                         T(1. / 24),
                         T(-.5)};
      const Vec<T> sine = x + x * z * horner<T>(z, s), cosine = T(1) + z * horner<T>(z, c);
      sin = sine + cosine * low, cos = cosine - sine * low;
    } else {
      constexpr T s[] = {T(1. / 51090942171709440000.),
                         T(-1. / 121645100408832000.),
                         T(1. / 355687428096000.),
                         T(-1. / 1307674368000.),
                         T(1. / 6227020800),
                         T(-1. / 39916800),
                         T(1. / 362880),
                         T(-1. / 5040),
                         T(1. / 120),
                         T(-1. / 6)};
      constexpr T c[] = {T(-1. / 1124000727777607680000.),
                         T(1. / 2432902008176640000.),
                         T(-1. / 6402373705728000.),
                         T(1. / 20922789888000.),
                         T(-1. / 87178291200),
                         T(1. / 479001600),
                         T(-1. / 3628800),
                         T(1. / 40320),
                         T(-1. / 720),
                         T(1. / 24),
                         T(-.5)};
      sin = x + x * z * horner<T>(z, s), cos = T(1) + z * horner<T>(z, c);
    }
  }

  // sin and cos - 1 of twice the angle; the latter from the smaller of the two, so that neither
  // small angles nor those near pi lose digits.
  Vec<T> turn() const { return T(2) * sin * cos; }
  Vec<T> less_one() const {
    const Vec<T> sine = sin * sin, cosine = cos * cos;
    return sine < cosine ? Vec<T>(T(-2) * sine) : Vec<T>(T(2) * cosine - T(2));
  }
};

// I(om, t) = even I + odd Jc, from sin and cos of t om / 2. These may come from the addition
// theorem, whose absolute error is too large for a small t om: there the series takes over.
template <class T>
struct Integral {
  Vec<T> even, odd;

  Integral(Vec<T> sin, Vec<T> cos, Vec<T> t, T omega) {
    constexpr T kSeries = T(0.125);
    const Vec<T> z = t * omega, w = z * z, size = z < T(0) ? -z : z;
    constexpr T e[] = {T(1. / 362880), T(-1. / 5040), T(1. / 120), T(-1. / 6), T(1)};
    constexpr T o[] = {T(1. / 3628800), T(-1. / 40320), T(1. / 720), T(-1. / 24), T(.5)};
    const T inverse = omega == 0 ? T(0) : T(2) / omega;
    even = size < kSeries ? Vec<T>(t * horner<T>(w, e)) : Vec<T>(sin * cos * inverse);
    odd = size < kSeries ? Vec<T>(t * z * horner<T>(w, o)) : Vec<T>(sin * sin * inverse);
  }
};
}  // namespace df::cpu::DF_ISA
