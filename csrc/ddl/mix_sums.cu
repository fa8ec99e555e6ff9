// The gradient of the taps from the partial sums of the chunks: dw_c = sum_r partial_{r,c}.
//
// CTA = 32 columns, 8 warps: warp w adds the rows w, w + 8, ... of its column in double, and the
// first warp adds the eight results; always in this order, so that the bits are the same every
// time. Shared memory: 2 KB, one double a thread, read without bank conflicts but the two of a
// double. Registers: at most 40. Bytes: every partial sum once, in whole sectors (128 bytes a
// warp), 4 bytes a column out; FLOPs: one a number. Bound by memory, and short beside the kernel
// before it, which moves about 18 times as many bytes.
#include "ddl/mix.h"

namespace df::cuda {
constexpr int kColumns = 32, kWarps = 8;

__global__ void __launch_bounds__(kColumns* kWarps)
    mix_sums_kernel(const float* partial, int64_t rows, int64_t columns, float* dw) {
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
  dw[column] = float(sum);
}
}  // namespace df::cuda

void df::mix_sums_cuda(const MixShape& s, const MixSums& sums, void* stream) {
  const int64_t columns = s.K * s.channels();
  if (columns == 0) return;
  const int64_t grid = (columns + cuda::kColumns - 1) / cuda::kColumns;
  cuda::mix_sums_kernel<<<grid, cuda::kColumns * cuda::kWarps, 0,
                          static_cast<cudaStream_t>(stream)>>>(sums.partial, sums.rows, columns,
                                                               sums.dw);
}
