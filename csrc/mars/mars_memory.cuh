// A warp's quantum of 256 elements in registers, 8 a lane, in pieces of kPiece = 16 / sizeof(T)
// neighbouring elements: piece j of a lane starts at element (32 j + lane) kPiece. So the accesses
// of a warp fill whole sectors for every element size: 16 bytes a lane in the compute type, 8 and
// 4 for 16-bit and 8-bit elements beside float. Loading and converting are two steps: all arrays
// are requested before the first value is used.
#pragma once
#include "common/cuda/load.cuh"
#include "mars/mars_quantize.h"
#include "mars/mars_random.h"

namespace df::cuda {
constexpr int kMarsLane = 8;  // elements
template <class T>
constexpr int kPiece = 16 / sizeof(T);
template <class T>
constexpr int kPieces = kMarsLane / kPiece<T>;

struct Piece {
  uint32_t word[4];
};
template <class T>
struct Raw {
  Piece piece[kPieces<T>];
  float factor;  // of 8-bit codes
};

// Some quantum of an array of n elements.
struct MarsPlace {
  int64_t quantum, n;
  template <class T>
  __device__ int64_t element(int piece) const {
    return quantum * kMarsQuantum + (piece * 32 + threadIdx.x % 32) * kPiece<T>;
  }
};

__device__ inline int mars_size(const MarsArray& a) {  // bytes of an element
  return a.absmax ? 1 : a.type == DType::f64 ? 8 : a.type == DType::f32 ? 4 : 2;
}

// ---- words of a piece: an element of `size` bytes among its neighbours, double as float if T is
template <class T>
__device__ inline void put_element(Piece& x, int k, int size, const char* p) {
  if (size == 1) {
    x.word[0] |= uint32_t(*reinterpret_cast<const uint8_t*>(p)) << 8 * k;
  } else if (size == 2) {
    x.word[k / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(p)) << 16 * (k % 2);
  } else if (size == 4) {
    x.word[k] = *reinterpret_cast<const uint32_t*>(p);
  } else if constexpr (sizeof(T) == 4) {
    x.word[k] = __float_as_uint(float(*reinterpret_cast<const double*>(p)));
  } else {
    const double y = *reinterpret_cast<const double*>(p);
    x.word[2 * k % 4] = __double2loint(y), x.word[2 * k % 4 + 1] = __double2hiint(y);
  }
}
template <class T>
__device__ inline void get_element(const Piece& x, int k, int size, char* p) {
  if (size == 1) {
    *reinterpret_cast<uint8_t*>(p) = uint8_t(x.word[0] >> 8 * k);
  } else if (size == 2) {
    *reinterpret_cast<uint16_t*>(p) = uint16_t(x.word[k / 2] >> 16 * (k % 2));
  } else if (size == 4) {
    *reinterpret_cast<uint32_t*>(p) = x.word[k];
  } else if constexpr (sizeof(T) == 4) {
    *reinterpret_cast<double*>(p) = __uint_as_float(x.word[k]);
  } else {
    *reinterpret_cast<double*>(p) = __hiloint2double(x.word[2 * k % 4 + 1], x.word[2 * k % 4]);
  }
}

// ---- whole pieces; kOnce: not used again, leaves the L2 cache first
template <bool kOnce, class W>
__device__ inline W load_words(const void* p) {
  return kOnce ? __ldcs(static_cast<const W*>(p)) : __ldcg(static_cast<const W*>(p));
}
template <bool kOnce, class W>
__device__ inline void store_words(void* p, W x) {
  kOnce ? __stcs(static_cast<W*>(p), x) : __stcg(static_cast<W*>(p), x);
}

template <class T, bool kOnce>
__device__ inline Piece load_piece(const char* p, int size) {
  switch (size * kPiece<T>) {
    case 2: return {{load_words<kOnce, unsigned short>(p)}};
    case 4: return {{load_words<kOnce, unsigned>(p)}};
    case 8: {
      const uint2 x = load_words<kOnce, uint2>(p);
      return {{x.x, x.y}};
    }
    case 16: {
      const uint4 x = load_words<kOnce, uint4>(p);
      return {{x.x, x.y, x.z, x.w}};
    }
    default: {  // doubles as floats
      const double2 a = load_words<kOnce, double2>(p), b = load_words<kOnce, double2>(p + 16);
      return {{__float_as_uint(float(a.x)), __float_as_uint(float(a.y)),
               __float_as_uint(float(b.x)), __float_as_uint(float(b.y))}};
    }
  }
}
template <class T, bool kOnce>
__device__ inline void store_piece(const Piece& x, char* p, int size) {
  const auto f = [&](int k) { return double(__uint_as_float(x.word[k])); };
  switch (size * kPiece<T>) {
    case 2: return store_words<kOnce>(p, static_cast<unsigned short>(x.word[0]));
    case 4: return store_words<kOnce>(p, x.word[0]);
    case 8: return store_words<kOnce>(p, make_uint2(x.word[0], x.word[1]));
    case 16: return store_words<kOnce>(p, make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
    default:
      store_words<kOnce>(p, make_double2(f(0), f(1)));
      store_words<kOnce>(p + 16, make_double2(f(2), f(3)));
  }
}

// kWhole: the quantum is full and the array aligned; else element by element, 0 behind the end.
template <class T, bool kWhole, bool kOnce = false>
__device__ inline Raw<T> mars_fetch(const MarsArray& a, const MarsPlace& at) {
  Raw<T> raw = {};
  if (a.data == nullptr) return raw;
  const int size = mars_size(a);
  if (a.absmax) raw.factor = __ldcg(a.absmax + at.quantum);
#pragma unroll
  for (int j = 0; j < kPieces<T>; ++j) {
    const int64_t i = at.element<T>(j);
    const char* p = static_cast<const char*>(a.data) + i * size;
    if constexpr (kWhole) {
      raw.piece[j] = load_piece<T, kOnce>(p, size);
    } else {
#pragma unroll
      for (int k = 0; k < kPiece<T>; ++k)
        if (i + k < at.n) put_element<T>(raw.piece[j], k, size, p + k * size);
    }
  }
  return raw;
}
template <class T, bool kWhole, bool kOnce = false>
__device__ inline void mars_put(const Raw<T>& raw, void* data, int size, const MarsPlace& at) {
#pragma unroll
  for (int j = 0; j < kPieces<T>; ++j) {
    const int64_t i = at.element<T>(j);
    char* p = static_cast<char*>(data) + i * size;
    if constexpr (kWhole) {
      store_piece<T, kOnce>(raw.piece[j], p, size);
    } else {
#pragma unroll
      for (int k = 0; k < kPiece<T>; ++k)
        if (i + k < at.n) get_element<T>(raw.piece[j], k, size, p + k * size);
    }
  }
}

// A lane's elements of a quantum of floats.
template <bool kOnce>
__device__ inline void mars_load_floats(const void* data, int64_t quantum, float (&x)[kMarsLane]) {
  const float4* const p = static_cast<const float4*>(data) + quantum * (kMarsQuantum / 4);
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float4 y = load_words<kOnce, float4>(p + 32 * j + threadIdx.x % 32);
    x[4 * j] = y.x, x[4 * j + 1] = y.y, x[4 * j + 2] = y.z, x[4 * j + 3] = y.w;
  }
}
__device__ inline void mars_store_floats(const float (&x)[kMarsLane], void* data, int64_t quantum) {
  float4* const p = static_cast<float4*>(data) + quantum * (kMarsQuantum / 4);
#pragma unroll
  for (int j = 0; j < 2; ++j)
    store_words<true>(p + 32 * j + threadIdx.x % 32,
                      make_float4(x[4 * j], x[4 * j + 1], x[4 * j + 2], x[4 * j + 3]));
}

// ---- conversions
__device__ inline uint16_t mars_halfword(const Raw<float>& raw, int k) {  // of element k
  return uint16_t(raw.piece[k / 4].word[k % 4 / 2] >> 16 * (k % 2));
}

// x[i] = fn(words of the piece of element i, its place there)
template <class T, class Fn>
__device__ inline void mars_convert(const Raw<T>& raw, T (&x)[kMarsLane], Fn fn) {
#pragma unroll
  for (int i = 0; i < kMarsLane; ++i) x[i] = fn(raw.piece[i / kPiece<T>].word, i % kPiece<T>);
}

// codes: what the 256 codes of this array stand for. One branch for all elements: the compiler
// would repeat it for each.
template <class T>
__device__ inline void mars_unpack(const Raw<T>& raw, const MarsArray& a, const float* codes,
                                   T (&x)[kMarsLane]) {
  const auto half = [](const uint32_t* word, int k) {
    return uint16_t(word[k / 2] >> 16 * (k % 2));
  };
  if (a.absmax)
    return mars_convert(raw, x, [&](const uint32_t* word, int k) {
      return T(codes[word[0] >> 8 * k & 255] * raw.factor);
    });
  if (a.type == DType::bf16)
    return mars_convert(
        raw, x, [&](const uint32_t* word, int k) { return T(to_float(bf16{half(word, k)})); });
  if (a.type == DType::f16)
    return mars_convert(
        raw, x, [&](const uint32_t* word, int k) { return T(to_float(f16{half(word, k)})); });
  if (sizeof(T) == 4 || a.type == DType::f32)
    return mars_convert(raw, x,
                        [](const uint32_t* word, int k) { return T(__uint_as_float(word[k])); });
  mars_convert(raw, x, [](const uint32_t* word, int k) {
    return T(__hiloint2double(word[2 * k % 4 + 1], word[2 * k % 4]));
  });
}

// 16-bit elements, from their bits.
template <class T, class Bits>
__device__ inline Raw<T> mars_pack_halves(Bits bits) {
  Raw<T> raw = {};
#pragma unroll
  for (int i = 0; i < kMarsLane; ++i)
    raw.piece[i / kPiece<T>].word[i % kPiece<T> / 2] |= uint32_t(uint16_t(bits(i))) << 16 * (i % 2);
  return raw;
}

template <class T>
__device__ inline Raw<T> mars_pack(const T (&x)[kMarsLane], DType type) {
  if (type == DType::bf16)
    return mars_pack_halves<T>([&](int i) {
      bf16 y;
      from_float(float(x[i]), &y);
      return y.bits;
    });
  if (type == DType::f16)
    return mars_pack_halves<T>([&](int i) {
      f16 y;
      from_float(float(x[i]), &y);
      return y.bits;
    });
  Raw<T> raw = {};
  const bool narrow = sizeof(T) == 4 || type == DType::f32;
#pragma unroll
  for (int i = 0; i < kMarsLane; ++i) {
    uint32_t* word = raw.piece[i / kPiece<T>].word;
    const int k = i % kPiece<T>;
    if (narrow)
      word[k] = __float_as_uint(float(x[i]));
    else
      word[2 * k % 4] = __double2loint(x[i]), word[2 * k % 4 + 1] = __double2hiint(x[i]);
  }
  return raw;
}

// The largest magnitude of the warp's quantum; NaN if there is one.
template <class T>
__device__ inline float mars_absmax(const T (&x)[kMarsLane]) {
  float largest = 0;
  const auto include = [&](float y) { largest = y > largest || y != y ? y : largest; };
#pragma unroll
  for (int k = 0; k < kMarsLane; ++k) include(fabsf(float(x[k])));
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) include(__shfl_xor_sync(0xffffffffu, largest, mask));
  return largest;
}

// Rounds to the array's type and stores; all lanes of a warp together.
template <class T, bool kWhole, bool kSigned, bool kOnce>
__device__ inline void mars_store(const T (&x)[kMarsLane], const MarsArray& a,
                                  const MarsPlace& at) {
  if (a.absmax == nullptr)
    return mars_put<T, kWhole, kOnce>(mars_pack(x, a.type), a.data, mars_size(a), at);
  const float absmax = mars_absmax(x), inverse = absmax == 0 ? 0 : 1 / absmax;
  Raw<T> raw = {};
#pragma unroll
  for (int i = 0; i < kMarsLane; ++i) {
    const uint32_t code = mars_encode<kSigned>(float(x[i]) * inverse);
    raw.piece[i / kPiece<T>].word[0] |= code << 8 * (i % kPiece<T>);
  }
  mars_put<T, kWhole, kOnce>(raw, a.data, 1, at);
  if (threadIdx.x % 32 == 0) a.absmax[at.quantum] = absmax;
}

template <bool kWhole, class Bits>
__device__ inline void mars_store_halves(Bits bits, void* data, const MarsPlace& at) {
  mars_put<float, kWhole>(mars_pack_halves<float>(bits), data, 2, at);
}

// Random bits of a lane's eight elements. A piece is half of a group of eight: of two neighbouring
// lanes one computes the group of the first pieces, the other that of the second ones.
__device__ inline MarsBits mars_lane_bits(uint64_t seed, int64_t quantum, uint32_t step,
                                          uint32_t number, MarsStream stream) {
  const uint32_t lane = threadIdx.x % 32;
  const bool odd = lane % 2;
  const uint64_t group = quantum * (kMarsQuantum / 8) + odd * 16 + lane / 2;
  const MarsBits mine = mars_bits(seed, group, step, number, stream);
  const uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? mine.word[0] : mine.word[2], 1);
  const uint32_t y = __shfl_xor_sync(0xffffffffu, odd ? mine.word[1] : mine.word[3], 1);
  return odd ? MarsBits{{x, y, mine.word[2], mine.word[3]}}
             : MarsBits{{mine.word[0], mine.word[1], x, y}};
}
}  // namespace df::cuda
