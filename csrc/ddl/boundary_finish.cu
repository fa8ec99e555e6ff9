// The gradients of the boundary's weights from the CTAs' partial sums, dW_c = sum_r P[r, c], each
// in its weight's type.
//
// A CTA of 256 threads takes 32 columns: a warp reads 32 neighbouring columns of every eighth row,
// 4 rows in flight; then one warp adds the eight sums of a column in their order. The order depends
// on the number of rows alone: equal bits in every launch. No rows: zeros.
// Shared memory: 1 KB. Registers: at most 40.
// Bytes: 4 rows * columns read, the gradients written: with one row an SM, 132 * 4 * 10 d (d_v =
// 4), 1 % of the traffic of the backward kernel for d = 2048 and N = 16384. Mostly from L2.
#include "common/cuda/load.cuh"
#include "ddl/boundary_launch.h"

namespace df::cuda {
namespace {
constexpr int kColumns = 32, kSlices = 8;

__global__ void __launch_bounds__(kColumns* kSlices)
    boundary_finish_kernel(const __grid_constant__ BoundaryFinish p) {
  __shared__ float sums[kSlices][kColumns];
  const int lane = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + lane;
  float sum = 0;
  if (column < p.total) {
#pragma unroll 4
    for (int64_t r = slice; r < p.rows; r += kSlices)
      sum += __ldcg(p.partials + r * p.stride + column);
  }
  sums[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || column >= p.total) return;
#pragma unroll
  for (int s = 1; s < kSlices; ++s) sum += sums[s][lane];
#pragma unroll
  for (int i = 0; i < kBoundaryGradients; ++i) {
    const BoundaryGradient& to = p.grads[i];
    const int64_t at = column - to.begin;
    if (to.data && at >= 0 && at < to.size) store_any(sum, to.data, to.type, at);
  }
}
}  // namespace
}  // namespace df::cuda

void df::boundary_finish_cuda(const BoundaryFinish& p, void* stream) {
  using namespace cuda;
  boundary_finish_kernel<<<(p.total + kColumns - 1) / kColumns, kColumns * kSlices, 0,
                           static_cast<cudaStream_t>(stream)>>>(p);
}
