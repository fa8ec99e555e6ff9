// Moving rows, scalars and states between tensors and a worker's scratch. Kernel files only.
#pragma once
#include <type_traits>

#include "common/cpu/convert.h"
#include "common/cpu/stream.h"
#include "common/cpu/transpose.h"
#include "gated_delta/chunk.h"
#include "gated_delta/preact.h"

namespace df::cpu::DF_ISA {
namespace {
// Hands out 64-byte aligned pieces of a zeroed block, or only counts them (base = null).
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(base + used);
    used += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

template <class T>
inline void scale_row(T* row, T x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) store(row + i, load(row + i) * x);
}

// Zeroes the padding of a row, which NaN of an earlier task may have reached.
template <class T>
inline void clear_padding(T* row, int64_t n) {
  for (int64_t i = n; i < round_up<T>(n); ++i) row[i] = 0;
}

// to[i] = row `begin + i` of a tensor, for one head.
template <class T>
void load_panel(const Input& x, int64_t batch, int64_t begin, int64_t head, int64_t rows, int64_t n,
                int64_t column, T* to, int64_t ld) {
  dispatch(x.dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    if constexpr (std::is_same_v<Compute<E>, T>) {
      const E* from = static_cast<const E*>(x.data) + column;
      for (int64_t i = 0; i < rows; ++i) {
        load_row(from + x.at(batch, begin + i, head), to + i * ld, n);
        clear_padding(to + i * ld, n);
      }
    }
  });
}

// The other way: row i of the panel, n columns, to element first + i * stride; if `streaming`, as
// whole vectors past the caches.
template <class T>
void store_rows(const T* panel, int64_t ld, int64_t rows, int64_t n, DType dtype, void* to,
                int64_t first, int64_t stride, bool streaming = false) {
  dispatch(dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    E* const out = static_cast<E*>(to) + first;
    if constexpr (std::is_same_v<E, T>)
      if (streaming) {
        for (int64_t i = 0; i < rows; ++i)
          for (int64_t c = 0; c < n; c += kLanes<T>)
            stream(out + i * stride + c, load(panel + i * ld + c));
        return;
      }
    if constexpr (std::is_same_v<Compute<E>, T>)
      for (int64_t i = 0; i < rows; ++i) store_row(panel + i * ld, out + i * stride, n);
  });
}

inline double scalar(const void* data, DType dtype, int64_t i) {
  double x = 0;
  dispatch(dtype, [&](auto tag) {
    x = to_compute(static_cast<const typename decltype(tag)::type*>(data)[i]);
  });
  return x;
}
inline double scalar(const Dense& x, int64_t i) {  // 0 where there is none
  return x.data ? scalar(x.data, x.dtype, i) : 0;
}
inline double scalar(const Input& x, int64_t batch, int64_t token, int64_t head) {
  return scalar(x.data, x.dtype, x.at(batch, token, head));
}
inline Gate head_gate(const PreActivation& pre, int64_t head) {
  return make_gate(scalar(pre.A_log, head), scalar(pre.dt_bias, head));
}
inline double beta_of(const PreActivation& pre, double x) {
  return pre.sigmoid_scale > 0 ? sigmoid_beta(x, pre.sigmoid_scale) : x;
}

// e^x, and 0 for what would be subnormal.
template <class T>
inline Vec<T> decay_of(Vec<T> x) {
  constexpr T kLow = sizeof(T) == 4 ? T(-87) : T(-708);
  return x < kLow ? Vec<T>{} : exp<T>(x);
}

// Rows to unit length; r keeps the factors.
template <class T>
void normalize(T* x, int64_t ld, int64_t rows, T* r) {
  for (int64_t i = 0; i < rows; ++i) {
    r[i] = inverse_norm(x + i * ld, ld);
    scale_row(x + i * ld, r[i], ld);
  }
}

// One state, to or from its place in a tensor; columns [v0, v0 + n). The rows of S are padded to
// whole vectors, and so is their number: a state stored v-first is transposed in whole blocks.
template <class T>
void load_state(const ChunkInputs& in, const State& state, int64_t index, int64_t v0, int64_t n,
                T* S, int64_t ld) {
  constexpr int64_t L = kLanes<T>;
  const int64_t K = in.shape.K, V = in.shape.V;
  if (!state.data) {
    __builtin_memset(S, 0, K * ld * sizeof(T));
    return;
  }
  dispatch(state.dtype, [&](auto tag) {
    using E = typename decltype(tag)::type;
    if constexpr (std::is_same_v<Compute<E>, T>) {
      const E* from = static_cast<const E*>(state.data) + index * K * V;
      if (!in.state_v_first)
        for (int64_t a = 0; a < K; ++a) {
          load_row(from + a * V + v0, S + a * ld, n);
          clear_padding(S + a * ld, n);
        }
      else
        for (int64_t c = 0; c < n; c += L)
          for (int64_t a = 0; a < K; a += L) {
            T block[L * L] = {};
            for (int64_t r = 0; r < L && c + r < n; ++r)
              load_row(from + (v0 + c + r) * K + a, block + r * L, K - a < L ? K - a : L);
            transpose_block(block, L, S + a * ld + c, ld);
          }
    }
  });
}
template <class T>
void store_state(const ChunkInputs& in, const T* S, int64_t ld, int64_t index, int64_t v0,
                 int64_t n, void* state) {
  constexpr int64_t L = kLanes<T>;
  const int64_t K = in.shape.K, V = in.shape.V;
  T* to = static_cast<T*>(state) + index * K * V;
  if (!in.state_v_first) {
    for (int64_t a = 0; a < K; ++a) store_row(S + a * ld, to + a * V + v0, n);
    return;
  }
  for (int64_t c = 0; c < n; c += L)
    for (int64_t a = 0; a < K; a += L) {
      T block[L * L];
      transpose_block(S + a * ld + c, ld, block, L);
      for (int64_t r = 0; r < L && c + r < n; ++r)
        store_row(block + r * L, to + (v0 + c + r) * K + a, K - a < L ? K - a : L);
    }
}
}  // namespace
}  // namespace df::cpu::DF_ISA
