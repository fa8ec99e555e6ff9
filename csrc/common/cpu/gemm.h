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

namespace detail {
template <class T, int kRows, int kCols, Into into>
inline void micro(int64_t k, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc, T keep) {
  Vec<T> acc[kRows][kCols];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j)
      acc[i][j] = into == Into::add ? keep * load(c + i * ldc + j * kLanes<T>) : Vec<T>{};
  const T* a0 = a.data;
  for (int64_t p = 0; p < k; ++p, a0 += a.col, b += ldb) {
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
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kCols; ++j) store(c + i * ldc + j * kLanes<T>, acc[i][j]);
}

template <class T, int kRows, Into into>
inline void columns(int64_t n, int64_t k, Strided<T> a, const T* b, int64_t ldb, T* c, int64_t ldc,
                    T keep) {
  int64_t j = 0;
  for (; j + kGemmCols * kLanes<T> <= n; j += kGemmCols * kLanes<T>)
    micro<T, kRows, kGemmCols, into>(k, a, b + j, ldb, c + j, ldc, keep);
  if constexpr (kGemmCols > 2)
    for (; j + 2 * kLanes<T> <= n; j += 2 * kLanes<T>)
      micro<T, kRows, 2, into>(k, a, b + j, ldb, c + j, ldc, keep);
  for (; j < n; j += kLanes<T>) micro<T, kRows, 1, into>(k, a, b + j, ldb, c + j, ldc, keep);
}

template <class T, Into into>
inline void rows(int rows_left, int64_t n, int64_t k, Strided<T> a, const T* b, int64_t ldb, T* c,
                 int64_t ldc, T keep) {
  static_assert(kGemmRows == 6);
  switch (rows_left) {
    case 1: return columns<T, 1, into>(n, k, a, b, ldb, c, ldc, keep);
    case 2: return columns<T, 2, into>(n, k, a, b, ldb, c, ldc, keep);
    case 3: return columns<T, 3, into>(n, k, a, b, ldb, c, ldc, keep);
    case 4: return columns<T, 4, into>(n, k, a, b, ldb, c, ldc, keep);
    case 5: return columns<T, 5, into>(n, k, a, b, ldb, c, ldc, keep);
    default: return columns<T, 6, into>(n, k, a, b, ldb, c, ldc, keep);
  }
}
}  // namespace detail

// C[m, n] = A[m, k] B[k, n], or keep C + A B with Into::add. Zeros of a triangular A are skipped up
// to the granularity of a row block, so they must really be there.
template <Into into = Into::set, Shape shape = Shape::full, class T>
inline void gemm(int64_t m, int64_t n, int64_t k, Strided<T> a, const T* b, int64_t ldb, T* c,
                 int64_t ldc, std::type_identity_t<T> keep = 1) {
  for (int64_t i = 0; i < m; i += kGemmRows) {
    const int left = int(m - i < kGemmRows ? m - i : kGemmRows);
    const int64_t first = shape == Shape::upper ? (i < k ? i : k) : 0;
    const int64_t last = shape == Shape::lower ? (i + left < k ? i + left : k) : k;
    const Strided<T> block{a.data + i * a.row + first * a.col, a.row, a.col};
    detail::rows<T, into>(left, n, last - first, block, b + first * ldb, ldb, c + i * ldc, ldc,
                          keep);
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
