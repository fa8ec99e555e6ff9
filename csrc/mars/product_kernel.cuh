// D = scale L R + add C (product.h) on mma.sync and cp.async.
//
// A CTA of 8 warps computes a tile of 128 x 128: two warpgroups of 64 rows, a warp 16 rows x 128
// columns. K goes in steps of 64 through a ring of two slots of 32 KB (product_tile.cuh): while one
// step is multiplied, the next is on its way, and the other CTA of the SM fills what is left. Where
// rows do not start on multiples of 16 bytes, elements are loaded one by one and stored to the ring
// by the threads. Shared memory 64 KB, at most 128 registers: two CTAs an SM. For these registers
// the tile's place is in shared memory till the end.
//
// A tile and step: 2 * 128 * 128 * 64 FLOPs for 32 KB of loads, which mostly hit the L2 cache;
// of a symmetric D t (t + 1) / 2 of t^2 tiles are computed. The end reads C once, and stores 32 KB,
// or twice that beside the diagonal. Bound by tensor cores and, at 16 rows a warp, nearly as much
// by reads of shared memory: 36 KB a step of 16 of K, 288 cycles where the products take 256
// (sm_80).
#pragma once
#include "common/cuda/mma_sm80.cuh"
#include "mars/product_tile.cuh"

namespace df::cuda {
// This thread's units of 16 bytes: row thread / 8 of a box and the row 32 below, unit thread % 8.
__device__ inline int unit_row() {
  return int(threadIdx.x) / 8;
}
__device__ inline int unit_col() {
  return int(threadIdx.x) % 8 * 8;
}

// A box to shared memory; what lies outside of the matrix becomes zero.
template <bool kVectors, class E>
__device__ inline void load_box(uint32_t to, const Matrices& m, int64_t matrix, int row, int col) {
  const int64_t left = m.cols - col - unit_col();
#pragma unroll 1
  for (int r = unit_row(); r < kProductBox; r += kProductThreads / 8) {
    const E* data = static_cast<const E*>(m.data);
    const E* from = data + matrix * m.batch + (row + r) * m.ld + col + unit_col();
    const int count = row + r >= m.rows || left <= 0 ? 0 : left < 8 ? int(left) : 8;
    const uint32_t at = Tile<E, kProductBox, kProductBox>{to}.at(r, unit_col());
    if constexpr (kVectors) {
      cp_async16(at, from, 2 * count);
    } else {
      uint32_t words[4] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < count) words[e / 2] |= uint32_t(from[e].bits) << e % 2 * 16;
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
  }
}

// Two boxes of each step by copies of 16 bytes, where most of the addresses stays from step to
// step: this thread's four units of 128 rows, K along them (kDown), or of 64 rows of K.
template <class E, bool kDown>
struct BoxPair {
  const E* from;
  int64_t rows32, step;  // to the next rows of this thread, to the next step; elements
  int rows, cols;        // left of the matrix, from the first unit on

  __device__ BoxPair(const Matrices& m, int64_t matrix, int row, int col)
      : from(static_cast<const E*>(m.data) + matrix * m.batch + (row + unit_row()) * m.ld + col +
             unit_col()),
        rows32(32 * m.ld),
        step(kDown ? kProductBox : kProductBox * m.ld),
        rows(int(m.rows) - row - unit_row()),
        cols(int(m.cols) - col - unit_col()) {}

  __device__ void load(uint32_t to) {
    const uint32_t at = Tile<E, kProductBox, kProductBox>{to}.at(unit_row(), unit_col());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int below = 32 * (kDown ? i : i % 2), beside = kDown ? 0 : i / 2 * kProductBox;
      const int count = below < rows ? min(max(cols - beside, 0), 8) : 0;
      cp_async16(at + i * (kBoxBytes / 2), from + below / 32 * rows32 + beside, 2 * count);
    }
    from += step;
    (kDown ? cols : rows) -= kProductBox;
  }
};

template <class E, bool kSymmetric, bool kVectors>
__global__ void __launch_bounds__(kProductThreads, 2)
    product_kernel(const __grid_constant__ Product p) {
  extern __shared__ __align__(1024) unsigned char product_memory[];
  const uint32_t ring = shared_address(product_memory);
  auto* const place = reinterpret_cast<ProductPlace*>(product_memory + 2 * kSlotBytes);
  const ProductPlace at = product_place<kSymmetric>(p);
  if (threadIdx.x == 0) *place = at;
  const int steps = product_steps(p);
  BoxPair<E, true> left(p.left, at.matrix, at.row, 0);
  BoxPair<E, kSymmetric> right(p.right, at.matrix, kSymmetric ? at.col : 0,
                               kSymmetric ? 0 : at.col);
  const auto slot = [&](int step) { return ring + uint32_t(step % 2) * kSlotBytes; };
  const auto load = [&](int step) {
    if (kVectors && step < steps) {
      left.load(slot(step));
      right.load(slot(step) + 2 * kBoxBytes);
    } else if (step < steps || p.add != 0) {
#pragma unroll 1
      for (int i = 0; i < kSlotBoxes; ++i) {
        const ProductBox box = product_box<kSymmetric>(at, step, steps, i);
        load_box<kVectors, E>(slot(step) + i * kBoxBytes, box.right ? p.right : p.left, at.matrix,
                              box.row, box.col);
      }
    }
    cp_async_commit();
  };
  ProductSums c;
  clear<kProductTile>(c);
  load(0);
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<0>();
    __syncthreads();  // all have this step, and are done with the one before
    load(step + 1);
    product_step<Sm80, E, kSymmetric>(c, slot(step));
  }
  cp_async_wait<0>();
  __syncthreads();
  product_finish<E, kSymmetric>(p, *place, slot(steps), c);
}

template <class E>
void product_launch(const Product& p, void* stream) {
  constexpr int kBytes = 2 * kSlotBytes + int(sizeof(ProductPlace));
  const bool vectors = p.left.whole_vectors() && p.right.whole_vectors();
  const auto kernel =
      p.symmetric ? (vectors ? product_kernel<E, true, true> : product_kernel<E, true, false>)
                  : (vectors ? product_kernel<E, false, true> : product_kernel<E, false, false>);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const auto ctas = unsigned(p.count * product_tiles(p));
  kernel<<<ctas, kProductThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(p);
}
}  // namespace df::cuda
