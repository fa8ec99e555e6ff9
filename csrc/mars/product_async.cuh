// D = scale L R + add C (product.h) on wgmma and TMA (sm_90a).
//
// A CTA of 9 warps computes a tile of 128 x 128: two warpgroups of 64 rows each, which only wait
// and multiply, and a warp of which one thread issues the copies. K goes in steps of 64 through a
// ring of three slots of 32 KB (product_tile.cuh): `full` counts the bytes that arrive, `empty` the
// warps that are done with a slot; a warpgroup keeps one step in flight while it issues the next.
// Zeros come from TMA for whatever lies outside of a matrix. Shared memory 96 KB and 48 bytes, at
// most 112 registers: two CTAs an SM, so that one multiplies while the other begins or ends.
//
// A tile and step: 2 * 128 * 128 * 64 FLOPs for 32 KB of loads, which mostly hit the L2 cache;
// of a symmetric D t (t + 1) / 2 of t^2 tiles are computed. The end reads C once, and stores 32 KB,
// or twice that beside the diagonal. Bound by tensor cores for large matrices, by the L2 cache
// next: 64 bytes of loads a cycle and SM at the full rate of the tensor cores.
#pragma once
#include <cuda.h>

#include "common/cuda/mma_sm90.cuh"
#include "mars/product_tile.cuh"

namespace df::cuda {
constexpr int kProductSlots = 3;

struct ProductMaps {
  CUtensorMap left, right;
};
struct ProductBarriers {
  uint64_t full[kProductSlots], empty[kProductSlots];
};

// The place of a step in the ring, and the parity of its phase there.
__device__ inline int ring_slot(int step) {
  return step % kProductSlots;
}
__device__ inline uint32_t ring_parity(int step) {
  return uint32_t(step / kProductSlots) & 1;
}

template <bool kSymmetric>
__device__ inline void produce(const Product& p, const ProductMaps& maps, const ProductPlace& at,
                               int steps, uint32_t ring, ProductBarriers& barriers) {
  for (int step = 0; step <= steps; ++step) {
    const int slot = ring_slot(step);
    if (step >= kProductSlots)
      mbarrier_wait(&barriers.empty[slot], ring_parity(step - kProductSlots));
    if (step == steps && p.add == 0) {  // no C, but the slot is free
      mbarrier_arrive(&barriers.full[slot]);
      return;
    }
    mbarrier_arrive_expect(&barriers.full[slot], kSlotBytes);
#pragma unroll
    for (int i = 0; i < kSlotBoxes; ++i) {
      const ProductBox box = product_box<kSymmetric>(at, step, steps, i);
      tma_load(ring + slot * kSlotBytes + i * kBoxBytes, box.right ? &maps.right : &maps.left,
               &barriers.full[slot], box.col, 0, box.row, int(at.matrix));
    }
  }
}

template <class E, bool kSymmetric>
__device__ inline void consume(float (&c)[kProductTile / 8][4], int steps, uint32_t ring,
                               ProductBarriers& barriers) {
  const auto multiply = [&](int step) {
    mbarrier_wait(&barriers.full[ring_slot(step)], ring_parity(step));
    Sm90::begin(c);
    product_step<Sm90, E, kSymmetric>(c, ring + ring_slot(step) * kSlotBytes);
    Sm90::commit();
  };
  multiply(0);  // not in the loop: ptxas would take the zeros in c for writes between products
  for (int step = 1; step < steps; ++step) {
    multiply(step);
    Sm90::wait<1>(c);
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&barriers.empty[ring_slot(step - 1)]);
  }
  Sm90::wait<0>(c);
}

template <class E, bool kSymmetric>
__global__ void __launch_bounds__(kProductThreads + 32, 2)
    product_async_kernel(const __grid_constant__ Product p,
                         const __grid_constant__ ProductMaps maps) {
  extern __shared__ __align__(1024) unsigned char product_memory[];
  const uint32_t ring = shared_address(product_memory);
  auto& barriers = *reinterpret_cast<ProductBarriers*>(product_memory + kProductSlots * kSlotBytes);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kProductSlots; ++i) {
      mbarrier_init(&barriers.full[i], 1);
      mbarrier_init(&barriers.empty[i], kProductThreads / 32);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  const ProductPlace at = product_place<kSymmetric>(p);
  const int steps = product_steps(p);
  if (threadIdx.x >= kProductThreads) {
    if (threadIdx.x == kProductThreads) produce<kSymmetric>(p, maps, at, steps, ring, barriers);
    return;
  }
  ProductSums c;
  clear<kProductTile>(c);
  consume<E, kSymmetric>(c, steps, ring, barriers);
  const int last = ring_slot(steps);
  mbarrier_wait(&barriers.full[last], ring_parity(steps));
  product_finish<E, kSymmetric>(p, at, ring + last * kSlotBytes, c);
}

template <class E>
void product_async_launch(const Product& p, const CUtensorMap& left, const CUtensorMap& right,
                          void* stream) {
  constexpr int kBytes = kProductSlots * kSlotBytes + int(sizeof(ProductBarriers));
  const auto kernel = p.symmetric ? product_async_kernel<E, true> : product_async_kernel<E, false>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const auto ctas = unsigned(p.count * product_tiles(p));
  kernel<<<ctas, kProductThreads + 32, kBytes, static_cast<cudaStream_t>(stream)>>>(
      p, ProductMaps{left, right});
}
}  // namespace df::cuda
