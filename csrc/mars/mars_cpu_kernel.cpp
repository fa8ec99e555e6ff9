// Streams of 1024 elements: whatever has the compute type T is used in place, other types pass
// through a converted copy in the L1 cache, so that one loop serves every mix of dtypes.
// Bytes an element (fp32): norm 8 read; update 20 read, 16 written. ~20 flop: memory-bound.
#include <immintrin.h>

#include "common/cpu/convert.h"
#include "common/cpu/math.h"
#include "mars/mars.h"

namespace df::cpu::DF_ISA {
namespace {
constexpr int64_t kBlock = 1024;
constexpr int kSums = 4;         // independent chains of additions
constexpr int64_t kAhead = 512;  // elements; the hardware's own prefetch alone takes 15 % longer
template <class T>
constexpr DType kNative = sizeof(T) == 8 ? DType::f64 : DType::f32;

template <class T>
const T* read(DType type, const void* from, int64_t at, int64_t n, T* copy) {
  if (type == kNative<T>) return static_cast<const T*>(from) + at;
  dispatch(type, [&](auto tag) {
    using E = typename decltype(tag)::type;
    const E* e = static_cast<const E*>(from) + at;
    if constexpr (sizeof(Compute<E>) == sizeof(T))
      load_row(e, copy, n);
    else
      for (int64_t i = 0; i < n; ++i) copy[i] = T(to_compute(e[i]));
  });
  return copy;
}

template <class T>
void write(DType type, const T* from, void* to, int64_t at, int64_t n) {
  dispatch(type, [&](auto tag) {
    using E = typename decltype(tag)::type;
    E* e = static_cast<E*>(to) + at;
    if constexpr (sizeof(Compute<E>) == sizeof(T))
      store_row(from, e, n);
    else
      for (int64_t i = 0; i < n; ++i) from_compute(Compute<E>(from[i]), e + i);
  });
}

inline Vec<double> add_squares(Vec<double> sum, Vec<double> x) {
  return sum + x * x;
}

// GCC 12 makes two instructions of half the width from __builtin_convertvector.
using FloatHalf = VecOf<float, kVecBytes / 2>::type;
inline Vec<double> widen(FloatHalf x) {
#if defined(__AVX512F__)
  return Vec<double>(_mm512_cvtps_pd(__m256(x)));
#elif defined(__AVX2__)
  return Vec<double>(_mm256_cvtps_pd(__m128(x)));
#else
  return __builtin_convertvector(x, Vec<double>);
#endif
}

// Squares of floats overflow from 1.8e19 on, those of doubles do not.
inline Vec<double> add_squares(Vec<double> sum, Vec<float> x) {
  struct Halves {
    FloatHalf low, high;
  };
  const Halves h = bit_cast<Halves>(x);
  const Vec<double> low = widen(h.low), high = widen(h.high);
  return sum + low * low + high * high;
}

template <class T>
Vec<T> load_some(const T* p, int64_t n) {  // zeros behind the n elements
  Vec<T> v{};
  __builtin_memcpy(&v, p, n * sizeof(T));
  return v;
}

template <class T>
double norm(const MarsTensor& t, int64_t begin, int64_t end) {
  T g_copy[kBlock], h_copy[kBlock];
  const T a = T(t.a * t.grad_scale), b = T(t.b);
  Vec<double> sums[kSums] = {};
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    const T* g = read(t.g_type, t.g, at, n, g_copy);
    const T* h = read<T>(t.h_type, t.h, at, n, h_copy);
    int64_t i = 0;
    for (; i + kSums * kLanes<T> <= n; i += kSums * kLanes<T>)
#pragma GCC unroll 4
      for (int j = 0; j < kSums; ++j) {
        const int64_t k = i + j * kLanes<T>;
        __builtin_prefetch(g + k + kAhead);
        __builtin_prefetch(h + k + kAhead);
        sums[j] = add_squares(sums[j], Vec<T>(a * load(g + k) - b * load(h + k)));
      }
    for (; i < n; i += kLanes<T>) {
      const int64_t left = n - i < kLanes<T> ? n - i : kLanes<T>;
      const Vec<T> c = a * load_some(g + i, left) - b * load_some(h + i, left);
      sums[0] = add_squares(sums[0], c);
    }
  }
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
struct Streams {
  const T *g, *h;
  T *p, *m, *v, *vmax, *h_out;
};

// m after the step, and the gradient in its sign and scale.
template <class T, bool kMatrix>
inline Vec<T> momentum(const MarsTensor& t, const Streams<T>& s, int64_t i, Vec<T>& g, Vec<T>& c) {
  const T a = T(t.a), b = T(t.b), clip = T(t.clip), beta = T(t.beta1), rest = T(1 - t.beta1);
  g = load(s.g + i) * T(t.grad_scale);
  if constexpr (kMatrix)
    c = (a * g - b * load(s.h + i)) * clip;
  else
    c = g;
  return beta * load(s.m + i) + rest * c;
}

template <class T, bool kMatrix, bool kCautious>
void step(const MarsTensor& t, const Streams<T>& s, int64_t n) {
  const T beta = T(t.beta2), rest = T(1 - t.beta2), rsqrt_bias2 = T(t.rsqrt_bias2);
  const T eps = T(t.eps), decay = T(t.decay), size = T(t.step_size);
  const Vec<T> scale = splat(T(t.caution_scale)), zero{};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    __builtin_prefetch(s.m + i + kAhead, 1);
    __builtin_prefetch(s.v + i + kAhead, 1);
    __builtin_prefetch(s.p + i + kAhead, 1);
    __builtin_prefetch(s.g + i + kAhead);
    if constexpr (kMatrix) __builtin_prefetch(s.h + i + kAhead, 1);
    Vec<T> g, c;
    const Vec<T> m = momentum<T, kMatrix>(t, s, i, g, c);
    Vec<T> v = beta * load(s.v + i) + rest * (c * c);
    store(s.m + i, m);
    store(s.v + i, v);
    if (s.vmax) {
      const Vec<T> before = load(s.vmax + i);
      v = before > v ? before : v;  // a NaN in v stays
      store(s.vmax + i, v);
    }
    Vec<T> u = m / (sqrt<T>(v) * rsqrt_bias2 + eps);
    if constexpr (kCautious) u = m * g > zero ? Vec<T>(u * scale) : zero;
    const Vec<T> p = load(s.p + i);
    store(s.p + i, Vec<T>(p - (decay * p + size * u)));
    if constexpr (kMatrix)
      if (s.h_out) store(s.h_out + i, g);
  }
}

template <class T>
void steps(const MarsTensor& t, const Streams<T>& s, int64_t n) {
  if (!t.h) return step<T, false, false>(t, s, n);
  return t.cautious ? step<T, true, true>(t, s, n) : step<T, true, false>(t, s, n);
}

// Fewer elements than a vector: the same loop on padded copies.
template <class T>
void step_tail(const MarsTensor& t, const Streams<T>& s, int64_t n) {
  Vec<T> g = load_some(s.g, n), h{}, p = load_some(s.p, n), m = load_some(s.m, n);
  Vec<T> v = load_some(s.v, n), vmax{}, h_out{};
  if (s.h) h = load_some(s.h, n);
  if (s.vmax) vmax = load_some(s.vmax, n);
  const auto pointer = [](Vec<T>& x) { return reinterpret_cast<T*>(&x); };
  steps<T>(t,
           {pointer(g), pointer(h), pointer(p), pointer(m), pointer(v),
            s.vmax ? pointer(vmax) : nullptr, s.h_out ? pointer(h_out) : nullptr},
           kLanes<T>);
  const int64_t bytes = n * sizeof(T);
  __builtin_memcpy(s.p, &p, bytes);
  __builtin_memcpy(s.m, &m, bytes);
  __builtin_memcpy(s.v, &v, bytes);
  if (s.vmax) __builtin_memcpy(s.vmax, &vmax, bytes);
  if (s.h_out) __builtin_memcpy(s.h_out, &h_out, bytes);
}

template <class T>
void update(const MarsTensor& t, int64_t begin, int64_t end) {
  T g_copy[kBlock], h_copy[kBlock], p_copy[kBlock];
  const bool p_native = t.p_type == kNative<T>, h_native = t.h_type == kNative<T>;
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    Streams<T> s{};
    s.g = read(t.g_type, t.g, at, n, g_copy);
    s.p = const_cast<T*>(read<T>(t.p_type, t.p, at, n, p_copy));
    s.m = static_cast<T*>(t.m) + at;
    s.v = static_cast<T*>(t.v) + at;
    if (t.vmax) s.vmax = static_cast<T*>(t.vmax) + at;
    if (t.h) s.h = read<T>(t.h_type, t.h, at, n, h_copy);
    if (t.h && t.write_h) s.h_out = const_cast<T*>(s.h);
    const int64_t whole = n / kLanes<T> * kLanes<T>;
    steps(t, s, whole);
    if (whole < n)
      step_tail<T>(t,
                   {s.g + whole, s.h ? s.h + whole : nullptr, s.p + whole, s.m + whole, s.v + whole,
                    s.vmax ? s.vmax + whole : nullptr, s.h_out ? s.h_out + whole : nullptr},
                   n - whole);
    if (!p_native) write<T>(t.p_type, s.p, t.p, at, n);
    if (s.h_out && !h_native) write<T>(t.h_type, s.h_out, t.h, at, n);
  }
}

template <class T>
double agreement(const MarsTensor& t, int64_t begin, int64_t end) {
  T g_copy[kBlock], h_copy[kBlock], m_copy[kBlock];
  Vec<T> count{};  // exact: at most 32768 / lanes
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock, padded = round_up<T>(n);
    // the padding has g = 0, which agrees with nothing
    const T* g = read(t.g_type, t.g, at, n, g_copy);
    const T* h = read<T>(t.h_type, t.h, at, n, h_copy);
    const T* m = static_cast<const T*>(t.m) + at;
    if (n < padded) {
      const auto pad = [&](const T*& from, T* copy) {
        if (from != copy) __builtin_memcpy(copy, from, n * sizeof(T));
        __builtin_memset(copy + n, 0, (padded - n) * sizeof(T));
        from = copy;
      };
      pad(g, g_copy), pad(h, h_copy), pad(m, m_copy);
    }
    const Streams<T> s{g, h, nullptr, const_cast<T*>(m), nullptr, nullptr, nullptr};
    for (int64_t i = 0; i < padded; i += kLanes<T>) {
      Vec<T> x, c;
      const Vec<T> y = momentum<T, true>(t, s, i, x, c);
      count += y * x > T(0) ? splat(T(1)) : Vec<T>{};
    }
  }
  return double(sum<T>(count));
}
}  // namespace

void mars_norm(const MarsTensor& t, int64_t begin, int64_t end, double* sum) {
  *sum = t.p_type == DType::f64 ? norm<double>(t, begin, end) : norm<float>(t, begin, end);
}

void mars_agreement(const MarsTensor& t, int64_t begin, int64_t end, double* count) {
  *count =
      t.p_type == DType::f64 ? agreement<double>(t, begin, end) : agreement<float>(t, begin, end);
}

void mars_update(const MarsTensor& t, int64_t begin, int64_t end) {
  t.p_type == DType::f64 ? update<double>(t, begin, end) : update<float>(t, begin, end);
}
}  // namespace df::cpu::DF_ISA
