// Frequencies as fractions of a turn, for host and device.
#pragma once
#include <cstdint>

namespace df {
constexpr uint64_t multiply_high(uint64_t a, uint64_t b) {
  return uint64_t(static_cast<unsigned __int128>(a) * b >> 64);
}

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

// |theta| / (2 pi) modulo 1 in units of 2^-64, truncated, with the sign of theta: the mantissa of
// the double with these bits, an integer below 2^53, times the 128 bits of 1 / (2 pi) that count
// for its exponent. Right for |theta| < 2^117; 0 for infinity, NaN and subnormal numbers.
constexpr uint64_t turn_of_bits(uint64_t bits) {
  const int exponent = int(bits >> 52 & 0x7ff);
  if (exponent == 0 || exponent == 0x7ff) return 0;
  const uint64_t mantissa = (bits & 0xfffffffffffff) | 0x10000000000000;
  const int shift = 64 + 1075 - exponent;
  const TurnWords x = turn_words(shift < 0 ? 0 : shift > 192 ? 192 : shift);
  const uint64_t size = mantissa * x.high + multiply_high(mantissa, x.low);
  return bits >> 63 ? 0 - size : size;
}
}  // namespace df
