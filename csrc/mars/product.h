// One product of a Newton-Schulz iteration, for a batch of matrices of 16-bit elements:
//   D = scale L R + add C
// symmetric: R = L^T and C = L, and D, of which half is computed, is symmetric bit for bit. (Where
// C counts, L has to be symmetric itself.) Otherwise C = R.
#pragma once
#include "common/dtype.h"

struct CUtensorMap_st;

namespace df {
struct Matrices {  // element (i, j) of matrix b: data[b batch + i ld + j]
  void* data;
  int64_t rows, cols, ld, batch;

  bool whole_vectors() const {  // rows start on multiples of 16 bytes
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld % 8 == 0 && batch % 8 == 0;
  }
};

struct Product {
  Matrices left, right, out;  // symmetric: right is left
  int64_t count;
  bool symmetric;
  bool whole_vectors;  // of out
  float scale, add;    // add 0: C is not read
};

constexpr int kProductTile = 128;  // rows and columns of D that a CTA computes

constexpr int64_t product_tiles(const Product& p) {  // of one matrix
  const int64_t rows = (p.out.rows + kProductTile - 1) / kProductTile;
  const int64_t cols = (p.out.cols + kProductTile - 1) / kProductTile;
  return p.symmetric ? rows * (rows + 1) / 2 : rows * cols;
}

// By mma.sync, any strides.
void product_bf16_cuda(const Product& p, void* stream);
void product_f16_cuda(const Product& p, void* stream);
// By wgmma, with tensor maps of left and right of kProductBox rows (common/cuda/tma.h).
constexpr int kProductBox = 64;
[[gnu::weak]] void product_bf16_sm90_cuda(const Product& p, const CUtensorMap_st& left,
                                          const CUtensorMap_st& right, void* stream);
[[gnu::weak]] void product_f16_sm90_cuda(const Product& p, const CUtensorMap_st& left,
                                         const CUtensorMap_st& right, void* stream);
}  // namespace df
