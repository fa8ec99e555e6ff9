// Blocks of an array as the compute type T: in place if it holds T, else through a copy in the L1
// cache, so that one loop serves every mix of element types. Copies are padded to whole vectors
// with zeros. Kernel files only.
#pragma once
#include "common/cpu/convert.h"
#include "common/cpu/math.h"
#include "mars/mars_quantize.h"
#include "mars/mars_random.h"

namespace df::cpu::DF_ISA {
namespace {
constexpr int64_t kBlock = 1024;

template <class T>
constexpr bool is_native(DType type) {
  return type == (sizeof(T) == 8 ? DType::f64 : DType::f32);
}

template <bool is_signed>
struct Levels {  // what the 256 codes stand for
  float x[256];
  constexpr Levels() : x{} {
    for (uint32_t code = 0; code < 256; ++code) x[code] = mars_decode<is_signed>(code);
  }
};

template <bool is_signed, class T>
void dequantize(const MarsArray& a, int64_t at, int64_t n, T* to) {
  static constexpr Levels<is_signed> levels;
  const uint8_t* codes = static_cast<const uint8_t*>(a.data) + at;
  for (int64_t i = 0; i < n; ++i) to[i] = T(levels.x[codes[i]] * a.absmax[(at + i) / kMarsQuantum]);
}

template <bool is_signed, class T>
void quantize(const T* from, int64_t at, int64_t n, const MarsArray& a) {
  uint8_t* codes = static_cast<uint8_t*>(a.data) + at;
  for (int64_t begin = 0; begin < n; begin += kMarsQuantum) {
    const int64_t end = n - begin < kMarsQuantum ? n : begin + kMarsQuantum;
    float most = 0;
    for (int64_t i = begin; i < end; ++i) {
      const float x = float(from[i] < 0 ? -from[i] : from[i]);
      most = x > most || x != x ? x : most;  // NaN stays
    }
    a.absmax[(at + begin) / kMarsQuantum] = most;
    const float inverse = most > 0 ? 1 / most : 0;
    for (int64_t i = begin; i < end; ++i)
      codes[i] = uint8_t(mars_encode<is_signed>(float(from[i]) * inverse));
  }
}

template <class T>
inline void pad(T* x, int64_t n) {
  for (int64_t i = n; i < round_up<T>(n); ++i) x[i] = 0;
}

template <class T>
void convert_in(DType type, const void* from, int64_t at, int64_t n, T* to) {
  dispatch(type, [&](auto tag) {
    using E = typename decltype(tag)::type;
    const E* e = static_cast<const E*>(from) + at;
    if constexpr (sizeof(Compute<E>) == sizeof(T))
      load_row(e, to, n);
    else
      for (int64_t i = 0; i < n; ++i) to[i] = T(to_compute(e[i]));
  });
}

template <class T>
void convert_out(DType type, const T* from, void* to, int64_t at, int64_t n) {
  dispatch(type, [&](auto tag) {
    using E = typename decltype(tag)::type;
    E* e = static_cast<E*>(to) + at;
    if constexpr (sizeof(Compute<E>) == sizeof(T))
      store_row(from, e, n);
    else
      for (int64_t i = 0; i < n; ++i) from_compute(Compute<E>(from[i]), e + i);
  });
}

// Null for an array that is not there.
template <class T, bool is_signed = true>
T* open(const MarsArray& a, int64_t at, int64_t n, T* copy) {
  if (!a.data) return nullptr;
  if (!a.absmax && is_native<T>(a.type) && n % kLanes<T> == 0) return static_cast<T*>(a.data) + at;
  if (a.absmax)
    dequantize<is_signed>(a, at, n, copy);
  else
    convert_in(a.type, a.data, at, n, copy);
  pad(copy, n);
  return copy;
}

template <class T, bool is_signed = true>
void close(const T* from, const MarsArray& a, int64_t at, int64_t n) {
  if (!a.data || (!a.absmax && from == static_cast<T*>(a.data) + at)) return;
  if (a.absmax)
    quantize<is_signed>(from, at, n, a);
  else
    convert_out(a.type, from, a.data, at, n);
}

inline void round_stochastic(const float* from, int64_t at, int64_t n, const MarsRandom& random,
                             uint32_t number, MarsStream stream, void* to) {
  uint16_t* out = static_cast<uint16_t*>(to) + at;
  for (int64_t i = 0; i < n; i += 8) {
    const MarsBits bits = mars_bits(random.seed, uint64_t(at + i) / 8, random.step, number, stream);
    for (int64_t k = 0; k < 8 && i + k < n; ++k)
      out[i + k] = mars_round_stochastic(bit_cast<uint32_t>(from[i + k]), mars_half(bits, int(k)));
  }
}
}  // namespace
}  // namespace df::cpu::DF_ISA
