// Rotation of bfloat16 rows in words of two elements: a word gives both as floats by a shift and a
// mask, and takes both back without moving lanes, which conversions of single elements need twice.
// For rows of whole vectors; the same bits as element by element.
#pragma once
#include "grape/rotary_angles.h"

namespace df::cpu::DF_ISA {
template <class E>
constexpr bool kHasWords = false;
template <>
constexpr bool kHasWords<bf16> = true;

template <class E>
inline bool in_words(const RotaryArgs& p) {
  return kHasWords<E> && p.P % (p.interleaved ? kLanes<float> : 2 * kLanes<float>) == 0;
}
template <class E>
inline Order order_of(const RotaryArgs& p) {
  if (in_words<E>(p)) return p.interleaved ? Order::planes : Order::paired;
  return p.interleaved ? Order::doubled : Order::planes;
}

inline U32 load_words(const bf16* p) {
  U32 w;
  __builtin_memcpy(&w, p, sizeof(w));
  return w;
}
inline Vec<float> lower(U32 w) {
  return bit_cast<Vec<float>>(U32(w << 16));
}
inline Vec<float> upper(U32 w) {
  return bit_cast<Vec<float>>(U32(w & 0xffff0000));
}
// Rounded to the upper 16 bits; the others are left as they come.
inline U32 rounded(Vec<float> x) {
  const U32 u = bit_cast<U32>(x), nearest = u + 0x7fff + ((u >> 16) & 1);
  return x != x ? U32(u | 0x400000) : nearest;
}
inline void store_words(bf16* p, Vec<float> low, Vec<float> high) {
  const U32 w = (rounded(low) >> 16) | (rounded(high) & 0xffff0000);
  __builtin_memcpy(p, &w, sizeof(w));
}

// Interleaved: a word is a plane. (x1 cos comes first, as it does lane by lane: of a sum the
// compiler fuses one product, and the bits are to be the same.)
inline void rotate_pairs(const bf16* x, bf16* y, const float* C, const float* S, int64_t P) {
  for (int64_t c = 0; c < P; c += kLanes<float>) {
    const U32 w = load_words(x + 2 * c);
    const Vec<float> x0 = lower(w), x1 = upper(w), cos = load(C + c), sin = load(S + c);
    store_words(y + 2 * c, x0 * cos - x1 * sin, x1 * cos + x0 * sin);
  }
}
// Halves: a word is two planes, even and odd.
inline void rotate_halves(const bf16* x, bf16* y, const float* C, const float* S, int64_t P) {
  constexpr int kL = kLanes<float>;
  for (int64_t c = 0; c < P; c += 2 * kL) {
    const U32 w0 = load_words(x + c), w1 = load_words(x + P + c);
    const Vec<float> even0 = lower(w0), odd0 = upper(w0), even1 = lower(w1), odd1 = upper(w1);
    const Vec<float> cos0 = load(C + c), sin0 = load(S + c);
    const Vec<float> cos1 = load(C + c + kL), sin1 = load(S + c + kL);
    store_words(y + c, even0 * cos0 - even1 * sin0, odd0 * cos1 - odd1 * sin1);
    store_words(y + P + c, even0 * sin0 + even1 * cos0, odd0 * sin1 + odd1 * cos1);
  }
}
}  // namespace df::cpu::DF_ISA
