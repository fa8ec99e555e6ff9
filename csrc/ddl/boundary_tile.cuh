// What the boundary's kernels share: how a token lies in shared memory, its way there and back, the
// weights, and sums over a group of warps.
//
// A thread takes items of kFeatures neighbouring features with all their channels: 16 bytes of the
// state, or one feature where that is more (kPieces of 16 bytes). The channels are padded to a
// power of two in shared memory, with zeros. All arrays there are units of 16 bytes; unit u stands
// at u ^ (u / 8 % n), where a thread reads n neighbouring units: the 8 lanes that the memory serves
// at once then use all banks, both for items and for linear copies.
#pragma once
#include "common/cuda/load.cuh"
#include "common/cuda/reduce.cuh"
#include "ddl/boundary_launch.h"

namespace df::cuda {
template <class E, int kChannels_>
struct BoundaryTile {
  using State = E;
  static constexpr int kChannels = kChannels_;
  static constexpr int kPiece = 16 / int(sizeof(E));
  static constexpr int kFeatures = kChannels >= kPiece ? 1 : kPiece / kChannels;
  static constexpr int kElements = kFeatures * kChannels;
  static constexpr int kPieces = kElements / kPiece;
  static constexpr int kUnits = kElements / 4;  // the same as float
};

constexpr int bit_ceil(int n) {
  int x = 1;
  while (x < n) x *= 2;
  return x;
}
__host__ __device__ constexpr int swizzled(int unit, int count) {
  return unit ^ (unit >> 3 & (count - 1));
}

// ---- shared memory by address, in words that are named: the compiler neither joins nor splits
// them
__device__ inline uint4 lds128(uint32_t at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(at)
               : "memory");
  return x;
}
__device__ inline uint2 lds64(uint32_t at) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "r"(at) : "memory");
  return x;
}
__device__ inline uint32_t lds32(uint32_t at) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
  return x;
}
__device__ inline uint16_t lds16(uint32_t at) {
  uint16_t x;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(at) : "memory");
  return x;
}
__device__ inline void sts128(uint32_t at, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.x), "r"(x.y), "r"(x.z),
               "r"(x.w)
               : "memory");
}
__device__ inline void sts64(uint32_t at, uint2 x) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(x.x), "r"(x.y) : "memory");
}
__device__ inline void sts32(uint32_t at, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ inline void sts16(uint32_t at, uint16_t x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(x) : "memory");
}
__device__ inline float lds_float(uint32_t at) {
  return __uint_as_float(lds32(at));
}
__device__ inline void copy_async(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ inline void wait_copies_but(int pending) {
  if (pending == 2)
    wait_copies<2>();
  else if (pending == 1)
    wait_copies<1>();
  else
    wait_copies<0>();
}

// ---- 16-bit elements, two a word
__device__ inline void unpack(uint32_t word, DType type, float& a, float& b) {
  if (type == DType::bf16) {
    a = __uint_as_float(word << 16), b = __uint_as_float(word & 0xffff0000u);
  } else {
    const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&word));
    a = x.x, b = x.y;
  }
}
__device__ inline uint32_t pack(float a, float b, DType type) {
  if (type == DType::bf16) {
    const __nv_bfloat162 x = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&x);
  }
  const __half2 x = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&x);
}

template <class E>
constexpr DType kTypeOf = DType::f32;
template <>
inline constexpr DType kTypeOf<bf16> = DType::bf16;
template <>
inline constexpr DType kTypeOf<f16> = DType::f16;

// ---- an item of the state
template <class T>
struct Packed {
  uint4 piece[T::kPieces];
};
__device__ inline uint32_t& word_of(uint4& x, int i) {
  return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w;
}

template <class T>
__device__ inline Packed<T> load_item(uint32_t base, int item) {
  Packed<T> raw;
#pragma unroll
  for (int h = 0; h < T::kPieces; ++h)
    raw.piece[h] = lds128(base + 16 * swizzled(item * T::kPieces + h, T::kPieces));
  return raw;
}
template <class T>
__device__ inline void store_item(uint32_t base, int item, const Packed<T>& raw) {
#pragma unroll
  for (int h = 0; h < T::kPieces; ++h)
    sts128(base + 16 * swizzled(item * T::kPieces + h, T::kPieces), raw.piece[h]);
}
template <class T>
__device__ inline void unpack_item(Packed<T> raw, float (&x)[T::kElements]) {
#pragma unroll
  for (int h = 0; h < T::kPieces; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = word_of(raw.piece[h], i);
      if constexpr (T::kPiece == 4)
        x[4 * h + i] = __uint_as_float(word);
      else
        unpack(word, kTypeOf<typename T::State>, x[8 * h + 2 * i], x[8 * h + 2 * i + 1]);
    }
}
template <class T>
__device__ inline Packed<T> pack_item(const float (&x)[T::kElements]) {
  Packed<T> raw;
#pragma unroll
  for (int h = 0; h < T::kPieces; ++h)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if constexpr (T::kPiece == 4)
        word_of(raw.piece[h], i) = __float_as_uint(x[4 * h + i]);
      else
        word_of(raw.piece[h], i) =
            pack(x[8 * h + 2 * i], x[8 * h + 2 * i + 1], kTypeOf<typename T::State>);
  return raw;
}

// ---- kCount neighbouring features, from i (a multiple of kCount), of an array with one element a
// feature: float in units swizzled by 2, or 16-bit elements
template <int kCount>
__device__ inline void load_features(uint32_t base, int i, DType type, float (&x)[kCount]) {
  if (type == DType::f32) {
    const uint32_t at = base + 16 * swizzled(i / 4, 2) + 4 * (i % 4);
    if constexpr (kCount == 1) {
      x[0] = lds_float(at);
    } else if constexpr (kCount == 2) {
      const uint2 raw = lds64(at);
      x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
    } else {
#pragma unroll
      for (int h = 0; h < kCount / 4; ++h) {
        const uint4 raw = lds128(base + 16 * swizzled(i / 4 + h, 2));
        x[4 * h] = __uint_as_float(raw.x), x[4 * h + 1] = __uint_as_float(raw.y);
        x[4 * h + 2] = __uint_as_float(raw.z), x[4 * h + 3] = __uint_as_float(raw.w);
      }
    }
    return;
  }
  const uint32_t at = base + 2 * i;
  if constexpr (kCount == 1) {
    float other;
    unpack(lds16(at), type, x[0], other);
  } else if constexpr (kCount == 2) {
    unpack(lds32(at), type, x[0], x[1]);
  } else if constexpr (kCount == 4) {
    const uint2 raw = lds64(at);
    unpack(raw.x, type, x[0], x[1]);
    unpack(raw.y, type, x[2], x[3]);
  } else {
    const uint4 raw = lds128(at);
    unpack(raw.x, type, x[0], x[1]);
    unpack(raw.y, type, x[2], x[3]);
    unpack(raw.z, type, x[4], x[5]);
    unpack(raw.w, type, x[6], x[7]);
  }
}
template <int kCount>
__device__ inline void store_features(uint32_t base, int i, DType type, const float (&x)[kCount]) {
  const auto bits = [&](int n) { return __float_as_uint(x[n]); };
  if (type == DType::f32) {
    const uint32_t at = base + 16 * swizzled(i / 4, 2) + 4 * (i % 4);
    if constexpr (kCount == 1) {
      sts32(at, bits(0));
    } else if constexpr (kCount == 2) {
      sts64(at, make_uint2(bits(0), bits(1)));
    } else {
#pragma unroll
      for (int h = 0; h < kCount / 4; ++h)
        sts128(base + 16 * swizzled(i / 4 + h, 2),
               make_uint4(bits(4 * h), bits(4 * h + 1), bits(4 * h + 2), bits(4 * h + 3)));
    }
    return;
  }
  const uint32_t at = base + 2 * i;
  const auto two = [&](int n) { return pack(x[n], x[n + 1], type); };
  if constexpr (kCount == 1)
    sts16(at, uint16_t(pack(x[0], 0, type)));
  else if constexpr (kCount == 2)
    sts32(at, two(0));
  else if constexpr (kCount == 4)
    sts64(at, make_uint2(two(0), two(2)));
  else
    sts128(at, make_uint4(two(0), two(2), two(4), two(6)));
}

// ---- a part of a token's row, to shared memory and back
struct RowPart {
  uint32_t shared;
  int swizzle;              // units that a thread reads together
  int size, d_v, channels;  // bytes of an element; channels: d_v, padded
  int features, inside;     // in shared memory, and those of them that exist
  bool vectors;             // 16-byte pieces are aligned in global memory, nothing is padded

  __device__ uint32_t unit(int i) const { return shared + 16 * swizzled(i, swizzle); }
  __device__ int units() const { return (features * channels * size + 15) / 16; }
  // fn(address, the element's place in the row or -1) for each element
  template <class Fn>
  __device__ void each_element(int thread, int threads, Fn fn) const {
    for (int e = thread; e < features * channels; e += threads) {
      const int f = e / channels, j = e % channels;
      fn(unit(e * size / 16) + e * size % 16, f < inside && j < d_v ? f * d_v + j : -1);
    }
  }
};

// Asynchronous where vectors are possible. Bytes that do not exist become zero.
__device__ inline void fetch(const RowPart& x, const void* row, int thread, int threads) {
  const char* const from = static_cast<const char*>(row);
  if (x.vectors) {
    const int bytes = x.inside * x.d_v * x.size;
    for (int i = thread; i < x.units(); i += threads)
      if (16 * i < bytes)
        copy_async(x.unit(i), from + 16 * i);
      else
        sts128(x.unit(i), make_uint4(0, 0, 0, 0));
  } else if (x.size == 4) {
    const auto* const p = reinterpret_cast<const unsigned int*>(from);
    x.each_element(thread, threads,
                   [&](uint32_t to, int i) { sts32(to, i < 0 ? 0u : __ldcg(p + i)); });
  } else {
    const auto* const p = reinterpret_cast<const unsigned short*>(from);
    x.each_element(thread, threads, [&](uint32_t to, int i) {
      sts16(to, i < 0 ? static_cast<unsigned short>(0) : __ldcg(p + i));
    });
  }
}
// Of a piece or element the same thread as in `fetch`.
__device__ inline void flush(const RowPart& x, void* row, int thread, int threads) {
  char* const to = static_cast<char*>(row);
  if (x.vectors) {
    const int bytes = x.inside * x.d_v * x.size;
    for (int i = thread; 16 * i < bytes; i += threads)
      __stcg(reinterpret_cast<uint4*>(to + 16 * i), lds128(x.unit(i)));
  } else if (x.size == 4) {
    auto* const p = reinterpret_cast<unsigned int*>(to);
    x.each_element(thread, threads, [&](uint32_t from, int i) {
      if (i >= 0) __stcg(p + i, lds32(from));
    });
  } else {
    auto* const p = reinterpret_cast<unsigned short*>(to);
    x.each_element(thread, threads, [&](uint32_t from, int i) {
      if (i >= 0) __stcg(p + i, lds16(from));
    });
  }
}

// ---- weights: as float in shared memory, or where they are
struct WeightView {
  const void* data;  // null: absent
  DType type;
  bool staged;      // has a copy in shared memory
  bool vectors;     // else: items are whole and aligned
  uint32_t shared;  // the copy
};
template <class T>
__device__ inline WeightView view_of(const Weight& w, const BoundaryArgs& a, uint32_t memory,
                                     int offset) {
  const bool whole = a.d % T::kFeatures == 0 && a.d_v == T::kChannels;
  const bool aligned = reinterpret_cast<uintptr_t>(w.data) % 16 == 0 && w.type != DType::f64;
  const bool present = w.data != nullptr;
  return {w.data, w.type, present && offset >= 0, present && whole && aligned, memory + offset};
}

// kCount neighbouring elements at i, a multiple of kCount, on their boundary.
template <int kCount>
__device__ inline void load_run(const WeightView& w, int64_t i, float* x) {
  constexpr int kStep = kCount < 4 ? kCount : 4;
#pragma unroll
  for (int n = 0; n < kCount; n += kStep) {
    if (w.type == DType::f32) {
      const float* const p = static_cast<const float*>(w.data) + i + n;
      if constexpr (kStep == 1) {
        x[n] = __ldg(p);
      } else if constexpr (kStep == 2) {
        const float2 raw = __ldg(reinterpret_cast<const float2*>(p));
        x[n] = raw.x, x[n + 1] = raw.y;
      } else {
        const float4 raw = __ldg(reinterpret_cast<const float4*>(p));
        x[n] = raw.x, x[n + 1] = raw.y, x[n + 2] = raw.z, x[n + 3] = raw.w;
      }
      continue;
    }
    const unsigned short* const p = static_cast<const unsigned short*>(w.data) + i + n;
    if constexpr (kStep == 1) {
      float other;
      unpack(__ldg(p), w.type, x[n], other);
    } else if constexpr (kStep == 2) {
      unpack(__ldg(reinterpret_cast<const unsigned*>(p)), w.type, x[n], x[n + 1]);
    } else {
      const uint2 raw = __ldg(reinterpret_cast<const uint2*>(p));
      unpack(raw.x, w.type, x[n], x[n + 1]);
      unpack(raw.y, w.type, x[n + 2], x[n + 3]);
    }
  }
}
// x[n] = the weight at place(n), 0 where that is negative
template <int kCount, class Place>
__device__ inline void load_each(const WeightView& w, float (&x)[kCount], Place place) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) {
    const int i = place(n);
    x[n] = i < 0 ? 0 : load_any(w.data, w.type, i);
  }
}

// Where an item's elements are in a weight [d, d_v] (kRead) or [d_v, d], and its features in [d].
template <class T, bool kRead>
struct ItemPlace {
  int item, d, d_v;
  __device__ int operator()(int n) const {
    const int f = item * T::kFeatures + n / T::kChannels, j = n % T::kChannels;
    return f >= d || j >= d_v ? -1 : kRead ? f * d_v + j : j * d + f;
  }
};
template <class T>
struct FeaturePlace {
  int item, d;
  __device__ int operator()(int n) const {
    const int f = item * T::kFeatures + n;
    return f < d ? f : -1;
  }
};

template <class T, bool kRead>
__device__ inline void load_weights(const WeightView& w, const ItemPlace<T, kRead>& place,
                                    float (&x)[T::kElements]) {
  if (w.staged) {
#pragma unroll
    for (int u = 0; u < T::kUnits; ++u) {
      const uint4 raw = lds128(w.shared + 16 * swizzled(place.item * T::kUnits + u, T::kUnits));
      x[4 * u] = __uint_as_float(raw.x), x[4 * u + 1] = __uint_as_float(raw.y);
      x[4 * u + 2] = __uint_as_float(raw.z), x[4 * u + 3] = __uint_as_float(raw.w);
    }
  } else if (!w.vectors) {
    load_each(w, x, place);
  } else if (kRead) {
    load_run<T::kElements>(w, int64_t(place.item) * T::kElements, x);
  } else {
    float y[T::kFeatures];
#pragma unroll
    for (int j = 0; j < T::kChannels; ++j) {
      load_run<T::kFeatures>(w, int64_t(j) * place.d + place.item * T::kFeatures, y);
#pragma unroll
      for (int f = 0; f < T::kFeatures; ++f) x[f * T::kChannels + j] = y[f];
    }
  }
}
template <class T>
__device__ inline void load_feature_weights(const WeightView& w, int item, int d,
                                            float (&x)[T::kFeatures]) {
  if (w.staged)
    load_features(w.shared, item * T::kFeatures, DType::f32, x);
  else if (w.vectors)
    load_run<T::kFeatures>(w, item * T::kFeatures, x);
  else
    load_each(w, x, FeaturePlace<T>{item, d});
}
template <int kCount>
__device__ inline void fill(float (&x)[kCount], float value) {
#pragma unroll
  for (int n = 0; n < kCount; ++n) x[n] = value;
}

// All items of the weights that have a place in shared memory, by the whole CTA.
template <class T, class Place>
__device__ inline void stage_weights(const WeightView& w, int items, Place place) {
  if (!w.staged) return;
  for (int e = threadIdx.x; e < items * T::kElements; e += blockDim.x) {
    place.item = e / T::kElements;
    const int i = place(e % T::kElements);
    const float x = i < 0 ? 0 : load_any(w.data, w.type, i);
    sts32(w.shared + 16 * swizzled(e / 4, T::kUnits) + 4 * (e % 4), __float_as_uint(x));
  }
}
template <class T>
__device__ inline void stage_feature_weights(const WeightView& w, int items, int d) {
  if (!w.staged) return;
  for (int f = threadIdx.x; f < items * T::kFeatures; f += blockDim.x) {
    const float x = f < d ? load_any(w.data, w.type, f) : 0;
    sts32(w.shared + 16 * swizzled(f / 4, 2) + 4 * (f % 4), __float_as_uint(x));
  }
}

// ---- a group of warps
struct Group {
  int warps, id;       // of the CTA's groups
  int warp, lane;      // in the group, in the warp
  uint32_t reduction;  // two buffers of `width` floats a warp
  int width, round;

  __device__ int thread() const { return warp * 32 + lane; }
  __device__ int threads() const { return warps * 32; }
  __device__ void sync() const {
    if (warps == 1)
      __syncwarp();
    else
      asm volatile("bar.sync %0, %1;" ::"r"(id + 1), "r"(warps * 32) : "memory");
  }
  __device__ uint32_t buffer() {  // of the next exchange; a barrier lies between two of them
    round ^= 1;
    return reduction + 4 * round * warps * width;
  }
};

// Sums over the lanes of kCount (a power of two, at most 32) values: lane l gets value l % kCount.
// Each step exchanges half of the values that are left.
template <int kCount>
__device__ inline float warp_sum(const float (&x)[kCount], int lane) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    constexpr int kHalf = kCount / 2;
    float y[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const bool upper = lane & kHalf;
      const float other = upper ? x[i] : x[i + kHalf];
      y[i] = (upper ? x[i + kHalf] : x[i]) + __shfl_xor_sync(0xffffffffu, other, kHalf);
    }
    return warp_sum(y, lane);
  }
}
template <int kCount>  // over lanes that are kCount or a multiple apart
__device__ inline float strided_sum(float x) {
#pragma unroll
  for (int mask = kCount; mask < 32; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}
template <int kCount>
__device__ inline float warps_sum(uint32_t buffer, int warps, int stride, int lane) {
  float sum = 0;
#pragma unroll 1  // few warps: one round mostly
  for (int w = lane / kCount; w < warps; w += 32 / kCount)
    sum += lds_float(buffer + 4 * (w * stride + lane % kCount));
  return strided_sum<kCount>(sum);
}
// The same over the group, in an order that depends on nothing else; also a barrier.
template <int kCount>
__device__ inline float group_sum(Group& g, const float (&x)[kCount]) {
  const float sum = strided_sum<kCount>(warp_sum(x, g.lane));
  const uint32_t buffer = g.buffer();
  if (g.warps > 1 && g.lane < kCount)
    sts32(buffer + 4 * (g.warp * kCount + g.lane), __float_as_uint(sum));
  g.sync();
  return g.warps > 1 ? warps_sum<kCount>(buffer, g.warps, kCount, g.lane) : sum;
}
__device__ inline float group_max(Group& g, float x) {  // of values that are not NaN
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  const uint32_t buffer = g.buffer();
  if (g.lane == 0) sts32(buffer + 4 * g.warp, __float_as_uint(x));
  g.sync();
  for (int w = 0; w < g.warps; ++w) x = fmaxf(x, lds_float(buffer + 4 * w));
  return x;
}
__device__ inline float broadcast(float x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

// Without overflow on either side; exactly 0 and 1 far out.
__device__ inline float two_sided_sigmoid(float x) {
  const float e = expf(-fabsf(x));
  return (x < 0 ? e : 1.0f) / (1.0f + e);
}
}  // namespace df::cuda
