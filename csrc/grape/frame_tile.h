// A tile of kFrameTile tokens of one head in the compute type: rows, and numbers a plane as
// [plane][token], so that vectors run over tokens.
#pragma once
#include "common/cpu/convert.h"
#include "common/cpu/gemm.h"
#include "common/cpu/transpose.h"
#include "grape/frame_angles.h"

namespace df::cpu::DF_ISA {
constexpr int kTile = kFrameTile;

// Lane l of the result is the sum of x[l].
template <class T, int kCount = kLanes<T>>
inline Vec<T> lane_sums(const Vec<T>* x) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    const Vec<T> a = lane_sums<T, kCount / 2>(x), b = lane_sums<T, kCount / 2>(x + kCount / 2);
    Vec<typename Bits<T>::I> even, odd;
    for (int l = 0; l < kLanes<T>; ++l) even[l] = 2 * l, odd[l] = 2 * l + 1;
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
  }
}

template <class T>
struct FrameTile {
  const FrameCpu& p;
  const int64_t h, first, count;
  alignas(64) double t[kTile] = {};

  FrameTile(const FrameCpu& call, int64_t head, int64_t begin, int64_t end)
      : p(call), h(head), first(begin), count(end - begin) {
    for (int64_t i = 0; i < count; ++i) t[i] = p.args.t[first + i];
  }

  // Rows of p.D elements; zeros in the padding and in the rows of absent tokens.
  void load_rows(const FrameRows& rows, T* to) const {
    const FrameArgs& a = p.args;
    dispatch(a.type, [&](auto tag) {
      using E = typename decltype(tag)::type;
      if constexpr (sizeof(Compute<E>) == sizeof(T))
        for (int64_t i = 0, b = first / a.T, t = first % a.T; i < count; ++i, ++t) {
          if (t == a.T) t = 0, ++b;
          const int64_t at = b * rows.b + t * rows.t + h * rows.h;
          load_row(static_cast<const E*>(rows.data) + at, to + i * p.D, a.D);
        }
    });
    if (p.D != a.D)
      for (int64_t i = 0; i < count; ++i)
        for (int64_t d = a.D; d < p.D; ++d) to[i * p.D + d] = 0;
    __builtin_memset(to + count * p.D, 0, (kTile - count) * p.D * sizeof(T));
  }
  void store_rows(const T* from, void* to) const {
    const FrameArgs& a = p.args;
    dispatch(a.type, [&](auto tag) {
      using E = typename decltype(tag)::type;
      if constexpr (sizeof(Compute<E>) == sizeof(T))
        for (int64_t i = 0; i < count; ++i)
          store_row(from + i * p.D, static_cast<E*>(to) + ((first + i) * a.H + h) * a.D, a.D);
    });
  }

  // planes = (rows W)^T, zeros in the padding of K. Without W the planes are channels.
  void coordinates(const T* rows, T* scratch, T* planes) const {
    const int64_t K = 2 * p.args.r;
    if (!p.W) return transpose(rows, p.D, kTile, p.D, planes, kTile);
    if (2 * K <= kLanes<T>) return few_coordinates(rows, planes);
    const T* W = static_cast<const T*>(p.W) + h * p.args.D * p.K;
    gemm(kTile, p.K, p.args.D, plain(rows, p.D), W, p.K, scratch, p.K);
    transpose(scratch, p.K, kTile, p.K, planes, kTile);
  }

  // The same by dot products of whole rows: a tile product would compute padding above all.
  void few_coordinates(const T* rows, T* planes) const {
    constexpr int kL = kLanes<T>;
    const int64_t K = 2 * p.args.r;
    const T* Wt = static_cast<const T*>(p.Wt) + h * K * p.D;
    for (int64_t k = 0; k < K; ++k)
      for (int i = 0; i < kTile; i += kL) {
        Vec<T> each[kL] = {};
        for (int64_t d = 0; d < p.D; d += kL) {
          const Vec<T> w = load(Wt + k * p.D + d);
#pragma GCC unroll 16
          for (int l = 0; l < kL; ++l) each[l] += w * load(rows + (i + l) * p.D + d);
        }
        store(planes + k * kTile + i, lane_sums<T>(each));
      }
    __builtin_memset(planes + K * kTile, 0, (p.K - K) * kTile * sizeof(T));
  }

  // rows += W planes
  void add_planes(const T* planes, T* scratch, T* rows) const {
    const int64_t K = 2 * p.args.r;
    if (p.W) {
      const T* Wt = static_cast<const T*>(p.Wt) + h * K * p.D;
      return gemm<Into::add>(count, p.D, K, transposed(planes, kTile), Wt, p.D, rows, p.D);
    }
    transpose(planes, kTile, p.D, kTile, scratch, p.D);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < K; ++d) rows[i * p.D + d] += scratch[i * p.D + d];
  }

  // Halves of the angles of plane k, and what rounding them to T lost.
  void half_angles(int64_t k, T* to, T* low) const {
    const double theta = p.args.theta[h * p.args.r + k];
    for (int i = 0; i < kTile; i += kLanes<double>) {
      const Vec<double> half = half_angle(load(t + i), theta);
      if constexpr (sizeof(T) == 8) {
        store(to + i, half), store(low + i, Vec<T>{});
      } else {
        using Half = typename VecOf<float, kVecBytes / 2>::type;
        const Half narrow = __builtin_convertvector(half, Half);
        const Vec<double> lost = half - __builtin_convertvector(narrow, Vec<double>);
        const Half rest = __builtin_convertvector(lost, Half);
        __builtin_memcpy(to + i, &narrow, sizeof(narrow));
        __builtin_memcpy(low + i, &rest, sizeof(rest));
      }
    }
  }
};

// Takes pieces of a worker's scratch memory.
template <class T>
struct Scratch {
  T* at;
  T* take(int64_t n) {
    T* piece = at;
    at += n;
    return piece;
  }
};
}  // namespace df::cpu::DF_ISA
