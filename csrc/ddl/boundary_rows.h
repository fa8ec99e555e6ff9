// Rows of tokens in the compute type, padded with zeros, and back; scalars of a token.
#pragma once
#include "common/cpu/convert.h"
#include "common/cpu/stream.h"
#include "ddl/boundary_cpu.h"
#include "ddl/boundary_lanes.h"

namespace df::cpu::DF_ISA {
template <class T>
constexpr DType kTypeOf = sizeof(T) == 8 ? DType::f64 : DType::f32;

// The n elements of a token's row: where they are, or converted in `scratch` of `padded` elements.
template <class T>
const T* read_row(const TokenRows& rows, DType type, int64_t token, int64_t n, int64_t padded,
                  T* scratch) {
  if (type == kTypeOf<T> && n == padded)
    return static_cast<const T*>(rows.data) + token * rows.stride;
  dispatch(type, [&](auto tag) {
    using E = typename decltype(tag)::type;
    if constexpr (sizeof(Compute<E>) == sizeof(T))
      load_row(static_cast<const E*>(rows.data) + token * rows.stride, scratch, n);
  });
  for (int64_t i = n; i < padded; ++i) scratch[i] = 0;
  return scratch;
}

// As above; zeros where the rows are absent.
template <class T>
const T* read_row_or_zeros(const TokenRows& rows, DType type, int64_t token, int64_t n,
                           int64_t padded, T* scratch) {
  if (rows.data) return read_row(rows, type, token, n, padded, scratch);
  for (int64_t i = 0; i < padded; ++i) scratch[i] = 0;
  return scratch;
}

// Where to compute a row of the contiguous `to`: in place, or in `scratch` for write_row.
template <class T>
T* row_to_write(void* to, DType type, int64_t token, int64_t n, int64_t padded, T* scratch) {
  const bool direct = type == kTypeOf<T> && n == padded;
  return direct ? static_cast<T*>(to) + token * n : scratch;
}
template <class T>
void write_row(const T* row, void* to, DType type, int64_t token, int64_t n) {
  dispatch(type, [&](auto tag) {
    using E = typename decltype(tag)::type;
    E* out = static_cast<E*>(to) + token * n;
    if constexpr (sizeof(Compute<E>) == sizeof(T))
      if (static_cast<const void*>(out) != row) store_row(row, out, n);
  });
}

// n whole vectors past the caches.
template <class T>
void stream_row(const T* row, void* to, int64_t token, int64_t n) {
  T* out = static_cast<T*>(to) + token * n;
  for (int64_t i = 0; i < n; i += kLanes<T>) stream(out + i, load(row + i));
}

template <class T>
T number_at(const TokenRows& rows, int64_t token, int64_t i = 0) {
  return static_cast<const T*>(rows.data)[token * rows.stride + i];
}

inline double logistic(double x) {
  return x >= 0 ? 1 / (1 + __builtin_exp(-x)) : __builtin_exp(x) / (1 + __builtin_exp(x));
}

// The gates of a token, through their sigmoids.
template <class T>
struct Gates {
  T v[kMaxChannels], beta, erase;

  Gates(const BoundaryArgs& p, int64_t token) {
    for (int j = 0; j < p.d_v; ++j) {
      const T x = number_at<T>(p.v, token, j);
      v[j] = p.v_logits ? T(p.v_scale * logistic(x)) : x;
    }
    const T x = number_at<T>(p.beta, token);
    beta = p.beta_logits ? T(2 * logistic(x)) : x;
    erase = p.beta_erase.data ? number_at<T>(p.beta_erase, token) : beta;
  }
  void update(const T* p, int64_t d_v, T* u) const {  // u = beta v - beta_erase p
    for (int j = 0; j < d_v; ++j) u[j] = beta * v[j] - erase * p[j];
  }
};

// x_i = sum_j read_ij y_ij, or the mean over channels; returns sum x^2.
template <class T, int kDv>
T read_out(const Lanes<T, kDv>& lanes, const T* y, const T* read, int64_t padded, T* x) {
  Vec<T> squares{};
  const T mean = T(1) / T(lanes.count());
  over_features(lanes, padded, [&](int64_t i, int64_t e) {
    Vec<T> each[Lanes<T, kDv>::kMax];
    for (int q = 0; q < lanes.count(); ++q) {
      each[q] = load(y + e + q * kLanes<T>);
      if (read) each[q] *= load(read + e + q * kLanes<T>);
    }
    Vec<T> sum = lanes.fold(each);
    if (!read) sum *= mean;
    store(x + i, sum);
    squares += sum * sum;
  });
  return sum<T>(squares);
}

// fn(T{}, Constant<d_v or 0>{}): the kernel's copy for a compute type and d_v.
template <int kDv>
struct Channels {
  static constexpr int value = kDv;
};
template <class T, class Fn>
void with_channels(int64_t d_v, Fn fn) {
  switch (d_v) {
    case 1: return fn(T{}, Channels<1>{});
    case 2: return fn(T{}, Channels<2>{});
    case 4: return fn(T{}, Channels<4>{});
    case 8: return fn(T{}, Channels<8>{});
    default: return fn(T{}, Channels<0>{});
  }
}
template <class Fn>
void with_types(bool wide, int64_t d_v, Fn fn) {
  wide ? with_channels<double>(d_v, fn) : with_channels<float>(d_v, fn);
}
}  // namespace df::cpu::DF_ISA
