// Transposition of panels in blocks of lanes x lanes, in registers.
#pragma once
#include <type_traits>

#include "common/cpu/vec.h"

namespace df::cpu::DF_ISA {
namespace detail {
template <class T>
struct Interleave {  // masks that take the lower (upper) halves of two vectors alternately
  using I = Vec<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  I low, high;
  constexpr Interleave() : low{}, high{} {
    for (int i = 0; i < kLanes<T>; ++i) {
      low[i] = i / 2 + (i % 2) * kLanes<T>;
      high[i] = low[i] + kLanes<T> / 2;
    }
  }
};
}  // namespace detail

struct Store {  // where the rows of a result go
  template <class T>
  void operator()(T* p, Vec<T> v) const {
    store(p, v);
  }
};

// One block. log2(lanes) rounds of perfect shuffles move the row index into the lane index.
template <class T, class Put = Store>
inline void transpose_block(const T* from, int64_t ld_from, T* to, int64_t ld_to, Put put = {}) {
  constexpr int n = kLanes<T>;
  const detail::Interleave<T> mask;
  Vec<T> a[n], b[n];
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) a[i] = load(from + i * ld_from);
#pragma GCC unroll 4
  for (int round = 1; round < n; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      b[2 * i] = __builtin_shuffle(a[i], a[i + n / 2], mask.low);
      b[2 * i + 1] = __builtin_shuffle(a[i], a[i + n / 2], mask.high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) put(to + i * ld_to, a[i]);
}

// to[j][i] = from[i][j], for whole blocks: both panels have their rows and columns padded to whole
// vectors, and the padding is moved along.
template <class T, class Put = Store>
inline void transpose(const T* from, int64_t ld_from, int64_t rows, int64_t cols, T* to,
                      int64_t ld_to, Put put = {}) {
  for (int64_t i = 0; i < rows; i += kLanes<T>)
    for (int64_t j = 0; j < cols; j += kLanes<T>)
      transpose_block(from + i * ld_from + j, ld_from, to + j * ld_to + i, ld_to, put);
}
}  // namespace df::cpu::DF_ISA
