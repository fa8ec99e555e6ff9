// dfreqs from the partial sums of a backward pass:
//   dfreqs[column] = sum over parts of part[column],  columns [Hf, P, A], a part a CTA of that pass
//
// CTA = 32 columns, 256 threads: eight of them share a column, each adds every eighth part, and the
// first adds the eight sums in their order. All in double, rounded once; the order does not depend
// on the device. Shared memory 2 KB, at most 64 registers. Bytes: 8 a part and column, whole
// sectors a warp. FLOPs: one addition for 8 bytes. Bound by latency: 528 parts of 64 columns are
// 270 KB. The parts are read once: from the L2 cache, where the pass before has left them.
#include "grape/rotary_launch.h"

namespace df::cuda {
namespace {
constexpr int kColumns = 32, kShares = 8;

__global__ void __launch_bounds__(kColumns* kShares)
    rotary_sum_kernel(const double* parts, int count, int64_t columns, void* out, bool out64) {
  __shared__ double sSums[kShares][kColumns];
  const int share = threadIdx.x / kColumns, lane = threadIdx.x % kColumns;
  const int64_t column = int64_t(blockIdx.x) * kColumns + lane;
  double sum = 0;
  if (column < columns) {
#pragma unroll 4
    for (int i = share; i < count; i += kShares) sum += parts[i * columns + column];
  }
  sSums[share][lane] = sum;
  __syncthreads();
  if (share != 0 || column >= columns) return;
  for (int i = 1; i < kShares; ++i) sum += sSums[i][lane];
  if (out64)
    static_cast<double*>(out)[column] = sum;
  else
    static_cast<float*>(out)[column] = float(sum);
}
}  // namespace
}  // namespace df::cuda

void df::rotary_sum_cuda(const RotaryLaunch& x, void* stream) {
  const RotaryArgs& p = x.args;
  const int64_t columns = p.Hf * p.P * p.A;
  const int64_t blocks = (columns + cuda::kColumns - 1) / cuda::kColumns;
  cuda::rotary_sum_kernel<<<blocks, cuda::kColumns * cuda::kShares, 0,
                            static_cast<cudaStream_t>(stream)>>>(x.parts, x.part_count, columns,
                                                                 x.dfreqs, p.freqs64);
}
