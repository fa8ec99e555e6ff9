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

// A token's row of states, n elements: where it is, or with zeros behind it in `scratch`.
template <class E>
const E* state_row(const TokenRows& rows, int64_t token, int64_t n, int64_t padded, E* scratch) {
  const E* row = static_cast<const E*>(rows.data) + token * rows.stride;
  if (n == padded) return row;
  __builtin_memcpy(scratch, row, n * sizeof(E));
  __builtin_memset(scratch + n, 0, (padded - n) * sizeof(E));
  return scratch;
}

// Where to put a row of states of the contiguous `to`: there, or in `scratch` for end_state_row.
template <class E>
E* begin_state_row(void* to, int64_t token, int64_t n, int64_t padded, E* scratch) {
  return n == padded ? static_cast<E*>(to) + token * n : scratch;
}
template <class E>
void end_state_row(const E* row, void* to, int64_t token, int64_t n) {
  E* out = static_cast<E*>(to) + token * n;
  if (out != row) __builtin_memcpy(out, row, n * sizeof(E));
}

// A vector of states to memory; returns it as it was rounded. Past the caches on demand, where that
// needs no conversion.
template <class E>
Vec<Compute<E>> put(Vec<Compute<E>> x, E* to, bool past_caches) {
  using T = Compute<E>;
  if constexpr (sizeof(E) == sizeof(T)) {
    past_caches ? stream(to, x) : store(to, x);
    return x;
  } else {
    return store_rounded(x, to);
  }
}

template <class T>
T* narrow_row_to_write(void* to, DType type, int64_t token, int64_t n, int64_t padded, T* scratch) {
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

template <class T>
T number_at(const TokenRows& rows, int64_t token, int64_t i = 0) {
  return static_cast<const T*>(rows.data)[token * rows.stride + i];
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

// x_i = sum_j read_ij y_ij, or the mean over channels, of kLanes features.
template <class T, int kDv>
struct ReadOut {
  const Lanes<T, kDv>& lanes;
  const T* read;  // padded rows, or null
  T mean = T(1) / T(lanes.count());

  Vec<T> weighted(Vec<T> y, int64_t at) const { return read ? Vec<T>(y * load(read + at)) : y; }
  Vec<T> fold(const Vec<T> (&each)[Lanes<T, kDv>::kMax]) const {
    const Vec<T> sum = lanes.fold(each);
    return read ? sum : Vec<T>(sum * mean);
  }

  // The row of x; returns sum x^2.
  T row(const T* y, int64_t padded, T* x) const {
    Vec<T> squares{};
    over_features(lanes, padded, [&](int64_t i, int64_t e) {
      Vec<T> each[Lanes<T, kDv>::kMax];
      for (int q = 0; q < lanes.count(); ++q) {
        const int64_t at = e + q * kLanes<T>;
        each[q] = weighted(load(y + at), at);
      }
      const Vec<T> sums = fold(each);
      store(x + i, sums);
      squares += sums * sums;
    });
    return sum<T>(squares);
  }
};

// fn(Type<E>{}, Channels<d_v or 0>{}): the kernel's copy for a type of states and d_v.
template <int kDv>
struct Channels {
  static constexpr int value = kDv;
};
template <class Fn>
void with_types(DType state, int64_t d_v, Fn fn) {
  dispatch(state, [&](auto type) {
    switch (d_v) {
      case 1: return fn(type, Channels<1>{});
      case 2: return fn(type, Channels<2>{});
      case 4: return fn(type, Channels<4>{});
      case 8: return fn(type, Channels<8>{});
      default: return fn(type, Channels<0>{});
    }
  });
}
}  // namespace df::cpu::DF_ISA
