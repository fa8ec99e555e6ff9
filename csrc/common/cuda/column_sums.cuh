// The second stage of a sum over many rows: total_c = sum_r partial_{r,c} of float partial sums.
//
// CTA = 32 columns, 8 warps: warp w adds the rows w, w + 8, ... of its column in double, and the
// first warp adds the eight results; always in this order, so that the bits are the same every
// time. Shared memory: 2 KB, one double a thread, read without bank conflicts but the two of a
// double. Registers: at most 40. Bytes: every partial sum once, in whole sectors (128 bytes a
// warp), 4 bytes a column out; FLOPs: one a number. Bound by memory, and short beside the kernel
// before it, which moves many times as many bytes.
#pragma once
#include "common/cuda/load.cuh"

namespace df::cuda {
struct DenseSums {  // where the totals go: a contiguous tensor
  void* data;
  DType dtype;
  __device__ void operator()(int64_t column, float total) const {
    store_any(total, data, dtype, column);
  }
};

template <class Put>  // put(column, total)
__global__ void __launch_bounds__(256)
    column_sums_kernel(const float* partial, int64_t rows, int64_t columns, const Put put) {
  constexpr int kColumns = 32, kWarps = 8;
  __shared__ double sums[kWarps][kColumns];
  const int lane = threadIdx.x % kColumns, warp = threadIdx.x / kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + lane;
  double sum = 0;
  if (column < columns)
    for (int64_t r = warp; r < rows; r += kWarps) sum += partial[r * columns + column];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int i = 1; i < kWarps; ++i) sum += sums[i][lane];
  put(column, float(sum));
}

template <class Put>
void column_sums(const float* partial, int64_t rows, int64_t columns, const Put& put,
                 cudaStream_t stream) {
  if (columns == 0) return;
  const unsigned grid = unsigned((columns + 31) / 32);
  column_sums_kernel<Put><<<grid, 256, 0, stream>>>(partial, rows, columns, put);
}
}  // namespace df::cuda
