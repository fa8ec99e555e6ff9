// D = scale L R + add C (product.h) on mma.sync and cp.async.
//
// A CTA of 8 warps computes a tile of 128 x 128: two warpgroups of 64 rows, a warp 16 rows x 128
// columns. K goes in steps of 64 through a ring of two slots of 32 KB (product_tile.cuh): while one
// step is multiplied, the next is on its way, and the other CTA of the SM fills what is left. Where
// rows do not start on multiples of 16 bytes, elements are loaded one by one and stored to the ring
// by the threads. Shared memory 64 KB, at most 128 registers: two CTAs an SM.
//
// A tile and step: 2 * 128 * 128 * 64 FLOPs for 32 KB of loads, which mostly hit the L2 cache;
// of a symmetric D t (t + 1) / 2 of t^2 tiles are computed. The end reads C once, and stores 32 KB,
// or twice that beside the diagonal. Bound by tensor cores and, at 16 rows a warp, nearly as much
// by reads of shared memory: 36 KB a step of 16 of K, 288 cycles where the products take 256
// (sm_80).
#pragma once
#include <algorithm>

#include "common/cuda/mma_sm80.cuh"
#include "mars/product_tile.cuh"

namespace df::cuda {
// A box to shared memory; what lies outside of the matrix becomes zero.
template <bool kVectors, class E>
__device__ inline void load_box(uint32_t to, const Matrices& m, int64_t matrix, int row, int col) {
  constexpr int kUnits = kProductBox / 8;
#pragma unroll
  for (int i = 0; i < kProductBox * kUnits / kProductThreads; ++i) {
    const int unit = int(threadIdx.x) + i * kProductThreads;
    const int r = unit / kUnits, first = unit % kUnits * 8;
    const int64_t left = row + r < m.rows ? m.cols - col - first : 0;
    const E* data = static_cast<const E*>(m.data);
    const E* from = data + matrix * m.batch + (row + r) * m.ld + col + first;
    const uint32_t at = Tile<E, kProductBox, kProductBox>{to}.at(r, first);
    if constexpr (kVectors) {
      const int count = left < 0 ? 0 : left < 8 ? int(left) : 8;
      cp_async16(at, count > 0 ? from : data, 2 * count);
    } else {
      uint32_t words[4] = {};
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (e < left) words[e / 2] |= uint32_t(from[e].bits) << e % 2 * 16;
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(words[0]),
                   "r"(words[1]), "r"(words[2]), "r"(words[3])
                   : "memory");
    }
  }
}

template <class E, bool kSymmetric, bool kVectors>
__global__ void __launch_bounds__(kProductThreads, 2)
    product_kernel(const __grid_constant__ Product p) {
  extern __shared__ __align__(1024) unsigned char product_memory[];
  const uint32_t ring = shared_address(product_memory);
  const ProductPlace at = product_place<kSymmetric>(p);
  const int steps = product_steps(p);
  const auto slot = [&](int step) { return ring + uint32_t(step % 2) * kSlotBytes; };
  const auto load = [&](int step) {
    if (step == steps && p.add == 0) return;
#pragma unroll
    for (int i = 0; i < kSlotBoxes; ++i) {
      const ProductBox box = product_box<kSymmetric>(at, step, steps, i);
      load_box<kVectors, E>(slot(step) + i * kBoxBytes, box.right ? p.right : p.left, at.matrix,
                            box.row, box.col);
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
  product_finish<E, kSymmetric>(p, at, slot(steps), c);
}

template <class E>
void product_launch(const Product& p, void* stream) {
  constexpr int kBytes = 2 * kSlotBytes;
  const bool vectors = p.left.whole_vectors() && p.right.whole_vectors();
  const auto kernel =
      p.symmetric ? (vectors ? product_kernel<E, true, true> : product_kernel<E, true, false>)
                  : (vectors ? product_kernel<E, false, true> : product_kernel<E, false, false>);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const auto ctas = unsigned(p.count * product_tiles(p));
  kernel<<<ctas, kProductThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(p);
}
}  // namespace df::cuda
