// A tile of kFrameTile tokens of one head in the compute type: rows, and numbers a plane as
// [plane][token], so that vectors run over tokens.
#pragma once
#include "common/cpu/convert.h"
#include "common/cpu/gemm.h"
#include "common/cpu/transpose.h"
#include "grape/frame_angles.h"

namespace df::cpu::DF_ISA {
constexpr int kTile = kFrameTile;

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
        for (int64_t i = 0; i < count; ++i) {
          const int64_t n = first + i, at = n / a.T * rows.b + n % a.T * rows.t + h * rows.h;
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

  // planes = (rows W)^T; also as it is, in `plain`. Without W the planes are channels.
  void coordinates(const T* rows, T* by_row, T* planes) const {
    if (!p.W) return transpose(rows, p.D, kTile, p.D, planes, kTile);
    const T* W = static_cast<const T*>(p.W) + h * p.args.D * p.K;
    gemm(kTile, p.K, p.args.D, plain(rows, p.D), W, p.K, by_row, p.K);
    transpose(by_row, p.K, kTile, p.K, planes, kTile);
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
