// Frequencies as fractions of a turn, for host and device.
#pragma once
#include <cstdint>

namespace df {
struct TurnWords {
  uint64_t low, high;
};

// 128 bits of floor(2^192 / (2 pi)) from bit `shift` on.
constexpr TurnWords turn_words(int shift) {
  constexpr uint64_t k0 = 0x36D8A5664F10E410, k1 = 0x7F09D5F47D4D3770, k2 = 0x28BE60DB9391054A;
  const int word = shift / 64, bit = shift % 64;
  const uint64_t a = word == 0 ? k0 : word == 1 ? k1 : word == 2 ? k2 : 0;
  const uint64_t b = word == 0 ? k1 : word == 1 ? k2 : 0;
  const uint64_t c = word == 0 ? k2 : 0;
  if (bit == 0) return {a, b};
  return {a >> bit | b << (64 - bit), b >> bit | c << (64 - bit)};
}

// |theta| / (2 pi) modulo 1 in units of 2^-64, truncated, of theta = mantissa 2^exponent with a
// mantissa below 2^53; `multiply_high(x, y)` is the upper half of a 64-bit product. Right for
// |theta| < 2^117.
template <class Fn>
constexpr uint64_t turn_of(uint64_t mantissa, int exponent, Fn multiply_high) {
  int shift = 64 - exponent;
  shift = shift < 0 ? 0 : shift > 192 ? 192 : shift;
  const TurnWords x = turn_words(shift);
  return mantissa * x.high + multiply_high(mantissa, x.low);
}

// From the bits of a double; 0 for infinity and NaN. Its subnormals are below every use.
template <class Fn>
constexpr uint64_t turn_of_bits(uint64_t bits, Fn multiply_high) {
  const int exponent = int(bits >> 52 & 0x7ff);
  if (exponent == 0 || exponent == 0x7ff) return 0;
  const uint64_t mantissa = (bits & 0xfffffffffffff) | 0x10000000000000;
  const uint64_t size = turn_of(mantissa, exponent - 1075, multiply_high);
  return bits >> 63 ? 0 - size : size;
}
}  // namespace df
