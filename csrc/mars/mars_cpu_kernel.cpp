// Bytes an element (fp32 mars-adamw): norm 8 read; update 20 read, 16 written. ~20 flop:
// memory-bound.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "mars/mars_arrays.h"

namespace df::cpu::DF_ISA {
namespace {
constexpr int kSums = 4;         // independent chains of additions
constexpr int64_t kAhead = 512;  // elements; the hardware's own prefetch alone takes 15 % longer

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
double norm(const MarsTensor& t, const MarsScalars& x, int64_t begin, int64_t end) {
  T g_copy[kBlock], h_copy[kBlock];
  const T a = T(x.a * x.g_scale), b = T(x.b);
  Vec<double> sums[kSums] = {};
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    const T* g = open<T>({const_cast<void*>(t.g), t.g_type}, at, n, g_copy);
    const T* h = open<T>(t.h, at, n, h_copy);
    int64_t i = 0;
    for (; i + kSums * kLanes<T> <= n; i += kSums * kLanes<T>)
#pragma GCC unroll 4
      for (int j = 0; j < kSums; ++j) {
        const int64_t k = i + j * kLanes<T>;
        __builtin_prefetch(g + k + kAhead);
        __builtin_prefetch(h + k + kAhead);
        sums[j] = add_squares(sums[j], Vec<T>(a * load(g + k) - b * load(h + k)));
      }
    for (; i < n; i += kLanes<T>)
      sums[0] = add_squares(sums[0], Vec<T>(a * load(g + i) - b * load(h + i)));
  }
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <class T>
struct Streams {
  const T *g, *h;
  T *p, *m, *v, *vmax, *h_out;
};

enum class Path { plain, corrected, stateless };

// One element vector: g in its sign and scale, c, the state m after the step, the direction d.
template <class T>
struct Momentum {
  Vec<T> g, c, m, d;
};
template <class T, Path path>
inline Momentum<T> momentum(const MarsScalars& x, const Streams<T>& s, int64_t i) {
  Momentum<T> y;
  y.g = y.c = load(s.g + i) * T(x.g_scale);
  if constexpr (path == Path::corrected) y.c = (T(x.a) * y.g - T(x.b) * load(s.h + i)) * T(x.clip);
  if constexpr (path == Path::stateless) y.c = T(x.a) * y.g;
  y.d = y.m = T(x.beta1) * load(s.m + i) + T(x.rest1) * y.c;
  if constexpr (path == Path::stateless) y.d = y.m + T(x.extra) * y.g;
  return y;
}

template <class T>
inline Vec<T> sign(Vec<T> x) {  // NaN stays
  const Vec<T> one = splat(T(1)), zero{};
  return x > zero ? one : x < zero ? Vec<T>(-one) : x;
}

// The direction after the second moment, and that stored.
template <class T>
inline Vec<T> adam(const MarsScalars& x, const Streams<T>& s, int64_t i, const Momentum<T>& y) {
  Vec<T> v = T(x.beta2) * load(s.v + i) + T(1 - x.beta2) * (y.c * y.c);
  store(s.v + i, v);
  if (s.vmax) {
    const Vec<T> before = load(s.vmax + i);
    v = before > v ? before : v;  // a NaN in v stays
    store(s.vmax + i, v);
  }
  return y.d / (sqrt<T>(v) * T(x.rsqrt_bias2) + T(x.eps));
}

template <class T, MarsRule rule, Path path, bool kCautious>
void step(const MarsScalars& x, const Streams<T>& s, int64_t n) {
  const Vec<T> scale = splat(T(x.caution_scale)), zero{};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    __builtin_prefetch(s.m + i + kAhead, 1);
    if constexpr (rule == MarsRule::adamw) __builtin_prefetch(s.v + i + kAhead, 1);
    __builtin_prefetch(s.p + i + kAhead, 1);
    __builtin_prefetch(s.g + i + kAhead);
    if constexpr (path == Path::corrected) __builtin_prefetch(s.h + i + kAhead, 1);
    const Momentum<T> y = momentum<T, path>(x, s, i);
    store(s.m + i, y.m);
    Vec<T> u = y.d;
    if constexpr (rule == MarsRule::adamw) u = adam<T>(x, s, i, y);
    if constexpr (rule == MarsRule::lion) u = sign<T>(u);
    if constexpr (kCautious) u = y.d * y.g > zero ? Vec<T>(u * scale) : zero;
    if constexpr (rule == MarsRule::momentum) {
      store(s.p + i, u);
    } else {
      const Vec<T> p = load(s.p + i);
      store(s.p + i, Vec<T>(p - (T(x.decay) * p + T(x.step_size) * u)));
    }
    if constexpr (path == Path::corrected)
      if (s.h_out) store(s.h_out + i, y.g);
  }
}

template <class T>
void step_given(const MarsScalars& x, const Streams<T>& s, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> p = load(s.p + i), u = load(s.g + i) * T(x.g_scale);
    store(s.p + i, Vec<T>(p - (T(x.decay) * p + T(x.step_size) * u)));
  }
}

template <class T, MarsRule rule>
void steps_of(const MarsSection& section, const MarsScalars& x, const Streams<T>& s, int64_t n) {
  const bool cautious = section.caution != MarsCaution::off;
  if (section.corrected)
    return cautious ? step<T, rule, Path::corrected, true>(x, s, n)
                    : step<T, rule, Path::corrected, false>(x, s, n);
  if constexpr (rule != MarsRule::adamw)
    if (section.stateless)
      return cautious ? step<T, rule, Path::stateless, true>(x, s, n)
                      : step<T, rule, Path::stateless, false>(x, s, n);
  step<T, rule, Path::plain, false>(x, s, n);
}

template <class T>
void steps(const MarsSection& section, const MarsScalars& x, const Streams<T>& s, int64_t n) {
  switch (section.rule) {
    case MarsRule::adamw: return steps_of<T, MarsRule::adamw>(section, x, s, n);
    case MarsRule::lion: return steps_of<T, MarsRule::lion>(section, x, s, n);
    case MarsRule::sgd: return steps_of<T, MarsRule::sgd>(section, x, s, n);
    case MarsRule::momentum: return steps_of<T, MarsRule::momentum>(section, x, s, n);
    case MarsRule::given: return step_given(x, s, n);
  }
}

// The parameter, or the master that it is rounded from.
template <class T>
T* open_parameter(const MarsTensor& t, const MarsSection& section, int64_t at, int64_t n, T* copy) {
  if constexpr (sizeof(T) == 4) {
    if (section.master == MarsMaster::fp32) return open<T>({t.master, DType::f32}, at, n, copy);
    if (section.master == MarsMaster::split16) {
      const uint16_t* high = static_cast<const uint16_t*>(t.p.data) + at;
      const uint16_t* low = static_cast<const uint16_t*>(t.master) + at;
      for (int64_t i = 0; i < n; ++i) copy[i] = bit_cast<float>(mars_join(high[i], low[i]));
      pad(copy, n);
      return copy;
    }
  }
  return open<T>(t.p, at, n, copy);
}

template <class T>
void close_parameter(const T* from, const MarsTensor& t, const MarsSection& section,
                     const MarsRandom& random, int64_t at, int64_t n) {
  if constexpr (sizeof(T) == 4) {
    if (section.master == MarsMaster::fp32) close(from, {t.master, DType::f32}, at, n);
    if (section.master == MarsMaster::split16) {
      uint16_t* high = static_cast<uint16_t*>(t.p.data) + at;
      uint16_t* low = static_cast<uint16_t*>(t.master) + at;
      for (int64_t i = 0; i < n; ++i) {
        const uint32_t bits = bit_cast<uint32_t>(from[i]);
        high[i] = mars_split_high(bits), low[i] = mars_split_low(bits);
      }
      return;
    }
    if (section.stochastic)
      return round_stochastic(from, at, n, random, t.number, MarsStream::parameter, t.p.data);
  }
  close(from, t.p, at, n);
}

template <class T>
void close_square(const T* from, const MarsTensor& t, const MarsRandom& random, int64_t at,
                  int64_t n) {
  if constexpr (sizeof(T) == 4)
    if (t.v.data && t.v.type == DType::bf16)
      return round_stochastic(from, at, n, random, t.number, MarsStream::second_moment, t.v.data);
  close<T, false>(from, t.v, at, n);
}

template <class T>
void update(const MarsTensor& t, const MarsSection& section, const MarsScalars& x,
            const MarsRandom& random, int64_t begin, int64_t end) {
  alignas(64) T g[kBlock], h[kBlock], p[kBlock], m[kBlock], v[kBlock], vmax[kBlock];
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    Streams<T> s{};
    s.g = open<T>({const_cast<void*>(t.g), t.g_type}, at, n, g);
    s.m = open<T>(t.m, at, n, m);
    s.v = open<T, false>(t.v, at, n, v);
    s.vmax = open<T, false>(t.vmax, at, n, vmax);
    T* const last = open<T>(t.h, at, n, h);
    s.h = last, s.h_out = section.write_h ? last : nullptr;
    s.p = open_parameter<T>(t, section, at, n, p);
    steps(section, x, s, n);
    close_parameter<T>(s.p, t, section, random, at, n);
    close<T>(s.m, t.m, at, n);
    close_square<T>(s.v, t, random, at, n);
    close<T, false>(s.vmax, t.vmax, at, n);
    if (s.h_out) close<T>(last, t.h, at, n);
  }
}

template <class T, Path path>
double agreement(const MarsTensor& t, const MarsScalars& x, int64_t begin, int64_t end) {
  alignas(64) T g[kBlock], h[kBlock], m[kBlock];
  Vec<T> count{};  // exact: at most 32768 / lanes
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t n = end - at < kBlock ? end - at : kBlock;
    Streams<T> s{};
    s.g = open<T>({const_cast<void*>(t.g), t.g_type}, at, n, g);  // padded with 0: no agreement
    s.m = open<T>(t.m, at, n, m);
    s.h = open<T>(t.h, at, n, h);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Momentum<T> y = momentum<T, path>(x, s, i);
      count += y.d * y.g > T(0) ? splat(T(1)) : Vec<T>{};
    }
  }
  return double(sum<T>(count));
}

template <class T>
double agreement(const MarsTensor& t, const MarsSection& section, const MarsScalars& x,
                 int64_t begin, int64_t end) {
  return section.corrected ? agreement<T, Path::corrected>(t, x, begin, end)
                           : agreement<T, Path::stateless>(t, x, begin, end);
}
}  // namespace

void mars_norm(const MarsTensor& t, const MarsScalars& x, int64_t begin, int64_t end, double* sum) {
  *sum = t.p.type == DType::f64 ? norm<double>(t, x, begin, end) : norm<float>(t, x, begin, end);
}

void mars_agreement(const MarsTensor& t, const MarsSection& section, const MarsScalars& x,
                    int64_t begin, int64_t end, double* count) {
  *count = t.p.type == DType::f64 ? agreement<double>(t, section, x, begin, end)
                                  : agreement<float>(t, section, x, begin, end);
}

void mars_update(const MarsTensor& t, const MarsSection& section, const MarsScalars& x,
                 const MarsRandom& random, int64_t begin, int64_t end) {
  t.p.type == DType::f64 ? update<double>(t, section, x, random, begin, end)
                         : update<float>(t, section, x, random, begin, end);
}
}  // namespace df::cpu::DF_ISA
