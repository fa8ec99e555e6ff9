// Random bits of stochastic rounding, the same on every device, thread count and launch shape:
// Philox4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, 2011), keyed by the
// seed, counter = (element / 8, step, number of the tensor and of the array). 16 bits an element.
#pragma once
#include "mars/mars_scalars.h"

namespace df {
enum class MarsStream : uint32_t { parameter, second_moment };

struct MarsBits {  // of elements 8 i to 8 i + 7
  uint32_t word[4];
};
DF_HOST_DEVICE inline uint32_t mars_half(const MarsBits& bits, int k) {
  return bits.word[k / 2] >> (k % 2 * 16) & 0xffff;
}

DF_HOST_DEVICE inline MarsBits mars_bits(uint64_t seed, uint64_t group_of_8, uint32_t step,
                                         uint32_t number, MarsStream stream) {
  uint32_t c0 = uint32_t(group_of_8), c1 = uint32_t(group_of_8 >> 32), c2 = step;
  uint32_t c3 = number * 2 + uint32_t(stream), k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t x = uint64_t(0xD2511F53u) * c0, y = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(y >> 32) ^ c1 ^ k0, c1 = uint32_t(y);
    c2 = uint32_t(x >> 32) ^ c3 ^ k1, c3 = uint32_t(x);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// bfloat16 of a float's bits: up with the probability of the part that is cut off.
DF_HOST_DEVICE inline uint16_t mars_round_stochastic(uint32_t bits, uint32_t random) {
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  if (!finite) return uint16_t(bits >> 16 | ((bits & 0x7fffffu) ? 0x40 : 0));
  return uint16_t((bits + random) >> 16);
}

// split16: p = upper half, rounded half up, low = the rest as a signed number, so that
// (p << 16) + low is the float again. NaN becomes a quiet one with low = 0; p may overflow to inf.
DF_HOST_DEVICE inline uint16_t mars_split_high(uint32_t bits) {
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x8000u) >> 16);
}
DF_HOST_DEVICE inline uint16_t mars_split_low(uint32_t bits) {
  return (bits & 0x7fffffffu) > 0x7f800000u ? 0 : uint16_t(bits);
}
DF_HOST_DEVICE inline uint32_t mars_join(uint16_t high, uint16_t low) {
  return (uint32_t(high) << 16) + uint32_t(int32_t(int16_t(low)));
}
}  // namespace df
