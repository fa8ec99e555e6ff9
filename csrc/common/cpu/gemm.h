// C (+)= A B for tiles that stay in cache. B and C are row-major with columns padded to whole
// vectors (their padding is computed, so it must hold finite numbers); A may be strided either way,
// so a transposed A costs nothing. The micro-kernel holds kRows x kCols vectors of C in registers
// and reads one row of B and one column of A a step. The order of the sums depends on k alone: any
// blocking of rows or columns gives the same bits.
#pragma once
#include <type_traits>

#include "common/cpu/vec.h"

namespace df::cpu::DF_ISA {
#if defined(__AVX512F__)
constexpr int kGemmRows = 6, kGemmCols = 4;  // 24 accumulators of 32 registers
#else
constexpr int kGemmRows = 6, kGemmCols = 2;  // 12 of 16
#endif

template <class T>
struct Strided {  // A: element (i, p) at data[i * row + p * col]
  const T* data;
  int64_t row, col;
};
template <class T>
Strided<T> plain(const T* a, int64_t ld) {
  return {a, ld, 1};
}
template <class T>
Strided<T> transposed(const T* a, int64_t ld) {
  return {a, 1, ld};
}

// Where A has nonzeros: row i of `lower` for p <= i, of `upper` for p >= i.
enum class Shape { full, lower, upper };
enum class Into { set, add };

// What a product runs once every kPause terms of a whole block, to prefetch: nothing. Anything else
// must be inlined, since the block's sums are in registers.
struct Nothing {};
constexpr int64_t kPause = 32;

namespace detail {
template <class T, int kRows, int kCols, Into into, class Between = Nothing>
[[gnu::noinline]] void micro(int64_t k, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc,
                             T keep, Between between = {}) {
  Vec<T> acc[kRows][kCols];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j)
      acc[i][j] = into == Into::add ? keep * load(c + i * ldc + j * kLanes<T>) : Vec<T>{};
  const T* a0 = a.data;
  constexpr bool kPauses = !std::is_same_v<Between, Nothing>;
  for (int64_t left = k; left > 0; left -= kPause) {
    if constexpr (kPauses) between();
    const int64_t n = kPauses && left > kPause ? kPause : left;
#pragma GCC unroll 4
    for (int64_t p = 0; p < n; ++p, a0 += a.col, b += ldb) {
      Vec<T> row[kCols];
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j) row[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec<T> x = splat(a0[i * a.row]);
#pragma GCC unroll 8
        for (int j = 0; j < kCols; ++j) acc[i][j] += x * row[j];
      }
    }
    if constexpr (!kPauses) break;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) store(c + i * ldc + j * kLanes<T>, acc[i][j]);
}

template <class T, int kRows, Into into, class Between = Nothing>
inline void columns(int64_t n, int64_t k, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc,
                    T keep, Between between = {}) {
  int64_t j = 0;
  for (; j + kGemmCols * kLanes<T> <= n; j += kGemmCols * kLanes<T>)
    micro<T, kRows, kGemmCols, into>(k, a, b + j, ldb, c + j, ldc, keep, between);
  if constexpr (kGemmCols > 2) {
    if (n - j == 3 * kLanes<T>) return micro<T, kRows, 3, into>(k, a, b + j, ldb, c + j, ldc, keep);
    for (; j + 2 * kLanes<T> <= n; j += 2 * kLanes<T>)
      micro<T, kRows, 2, into>(k, a, b + j, ldb, c + j, ldc, keep);
  }
  for (; j < n; j += kLanes<T>) micro<T, kRows, 1, into>(k, a, b + j, ldb, c + j, ldc, keep);
}

template <class T, Into into, class Between = Nothing>
inline void rows(int rows_left, int64_t n, int64_t k, Strided<T> a, const T* b, int64_t ldb, T* c,
                 int64_t ldc, T keep, Between between = {}) {
  static_assert(kGemmRows == 6);
  switch (rows_left) {
    case 1: return columns<T, 1, into>(n, k, a, b, ldb, c, ldc, keep);
    case 2: return columns<T, 2, into>(n, k, a, b, ldb, c, ldc, keep);
    case 3: return columns<T, 3, into>(n, k, a, b, ldb, c, ldc, keep);
    case 4: return columns<T, 4, into>(n, k, a, b, ldb, c, ldc, keep);
    case 5: return columns<T, 5, into>(n, k, a, b, ldb, c, ldc, keep);
    default: return columns<T, 6, into>(n, k, a, b, ldb, c, ldc, keep, between);
  }
}
}  // namespace detail

// C[m, n] = A[m, k] B[k, n], or keep C + A B with Into::add. Zeros of a triangular A are skipped up
// to the granularity of a row block, so they must really be there. `between` runs after each whole
// block.
template <Into into = Into::set, Shape shape = Shape::full, class T, class Between = Nothing>
inline void gemm(int64_t m, int64_t n, int64_t k, Strided<T> a, const T* b, int64_t ldb, T* c,
                 int64_t ldc, std::type_identity_t<T> keep = 1, Between between = {}) {
  for (int64_t i = 0; i < m; i += kGemmRows) {
    const int left = int(m - i < kGemmRows ? m - i : kGemmRows);
    const int64_t first = shape == Shape::upper ? (i < k ? i : k) : 0;
    const int64_t last = shape == Shape::lower ? (i + left < k ? i + left : k) : k;
    const Strided<T> block{a.data + i * a.row + first * a.col, a.row, a.col};
    detail::rows<T, into>(left, n, last - first, block, b + first * ldb, ldb, c + i * ldc, ldc,
                          keep, between);
  }
}

namespace detail {
template <class T, int kRows, int kCols, int kDepth>
[[gnu::noinline]] void shallow(const T* a, int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc,
                               T keep) {
  Vec<T> acc[kRows][kCols];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) acc[i][j] = keep * load(c + i * ldc + j * kLanes<T>);
#pragma GCC unroll 16
  for (int p = 0; p < kDepth; ++p, a += lda, b += ldb) {
    Vec<T> row[kCols];
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) row[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<T> x = splat(a[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kCols; ++j) acc[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) store(c + i * ldc + j * kLanes<T>, acc[i][j]);
}
}  // namespace detail

// C[m, n] = keep C + A^T[m, kDepth] B[kDepth, n] for a depth so small that a loop over it would
// cost a mispredicted branch a block. Blocks have five rows: the out-of-order window holds one.
template <int kDepth, class T>
inline void gemm_shallow(int64_t m, int64_t n, const T* a, int64_t lda, const T* b, int64_t ldb,
                         T* c, int64_t ldc, T keep) {
  constexpr int kRows = 5;
  int64_t i = 0, wide = n / (kGemmCols * kLanes<T>)*(kGemmCols * kLanes<T>);
  for (; i + kRows <= m; i += kRows) {
    int64_t j = 0;
    for (; j < wide; j += kGemmCols * kLanes<T>)
      detail::shallow<T, kRows, kGemmCols, kDepth>(a + i, lda, b + j, ldb, c + i * ldc + j, ldc,
                                                   keep);
    if constexpr (kGemmCols > 2)
      for (; j + 3 * kLanes<T> <= n; j += 3 * kLanes<T>)
        detail::shallow<T, kRows, 3, kDepth>(a + i, lda, b + j, ldb, c + i * ldc + j, ldc, keep);
    for (; j < n; j += kLanes<T>)
      detail::shallow<T, kRows, 1, kDepth>(a + i, lda, b + j, ldb, c + i * ldc + j, ldc, keep);
  }
  if (i < m)
    detail::rows<T, Into::add>(int(m - i), n, kDepth, transposed(a + i, lda), b, ldb, c + i * ldc,
                               ldc, keep);
}

// C[m, n] = A[m, k] B[k, n] where n is so small that one vector of columns must fill the pipes: the
// even and the odd terms are summed apart. B and C are dense; C is written up to a multiple of
// kNarrowRows rows, from rows of A that must exist and may hold anything.
constexpr int kNarrowRows = 8;
template <class T>
[[gnu::noinline]] void gemm_narrow(int64_t m, int64_t n, int64_t k, const T* a, int64_t lda,
                                   const T* b, T* c) {
  for (int64_t i = 0; i < m; i += kNarrowRows)
    for (int64_t j = 0; j < n; j += kLanes<T>) {
      Vec<T> even[kNarrowRows] = {}, odd[kNarrowRows] = {};
      const T *at = a + i * lda, *row = b + j;
      int64_t p = 0;
      for (; p + 2 <= k; p += 2, row += 2 * n) {
        const Vec<T> x = load(row), y = load(row + n);
#pragma GCC unroll 8
        for (int r = 0; r < kNarrowRows; ++r) {
          even[r] += at[r * lda + p] * x;
          odd[r] += at[r * lda + p + 1] * y;
        }
      }
      for (int r = 0; p < k && r < kNarrowRows; ++r) even[r] += at[r * lda + p] * load(row);
#pragma GCC unroll 8
      for (int r = 0; r < kNarrowRows; ++r) store(c + (i + r) * n + j, even[r] + odd[r]);
    }
}

// The lower triangle of C[m, m] = A[m, k] B[k, m], diagonal included; right of it C is written up
// to the next whole vector or not at all.
template <class T>
inline void gemm_lower(int64_t m, int64_t k, Strided<T> a, const T* b, int64_t ldb, T* c,
                       int64_t ldc) {
  for (int64_t i = 0; i < m; i += kGemmRows) {
    const int left = int(m - i < kGemmRows ? m - i : kGemmRows);
    const Strided<T> block{a.data + i * a.row, a.row, a.col};
    detail::rows<T, Into::set>(left, round_up<T>(i + left), k, block, b, ldb, c + i * ldc, ldc,
                               T(0));
  }
}
}  // namespace df::cpu::DF_ISA
