// Second stage of the gradients of A_log and dt_bias: the chunks' partial sums in float64.
//   dA_log_sum[h] = sum over slots of dA_log[slot, h],  likewise ddt_bias
//
// CTA = 4 heads of one of the two, 256 threads: lanes four apart share a head and take every 64th
// slot, so that a warp reads whole sectors; then the lanes of a warp and the eight warps are added,
// always in the same order, and the sum is rounded once. Empty slots hold zeros.
// Shared memory: 256 bytes. Registers: 40.
// Bytes: 8 a slot and head (262 KB for 32k tokens of 64 heads), additions as many as numbers. Bound
// by latency: the chunks have left the numbers in the L2 cache.
#include "gated_delta/chunk_bwd_cuda.h"

namespace df::cuda {
namespace {
constexpr int kSumThreads = 256, kSumHeads = 4;

__global__ void __launch_bounds__(kSumThreads)
    chunk_bwd_sums_kernel(const __grid_constant__ ChunkBwdCuda p, int64_t slots) {
  __shared__ double warps[kSumThreads / 32][kSumHeads];
  const double* const from = blockIdx.y ? p.ddt_bias : p.dA_log;
  float* const to = blockIdx.y ? p.ddt_bias_sum : p.dA_log_sum;
  if (!from) return;
  const int64_t HV = p.in.shape.HV,
                head = int64_t(blockIdx.x) * kSumHeads + threadIdx.x % kSumHeads;
  double sum = 0;
  if (head < HV)
    for (int64_t i = threadIdx.x / kSumHeads; i < slots; i += kSumThreads / kSumHeads)
      sum += from[i * HV + head];
#pragma unroll
  for (int mask = kSumHeads; mask < 32; mask *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
  if (threadIdx.x % 32 < kSumHeads) warps[threadIdx.x / 32][threadIdx.x % 32] = sum;
  __syncthreads();
  if (threadIdx.x >= kSumHeads || head >= HV) return;
  double total = 0;
#pragma unroll
  for (int w = 0; w < kSumThreads / 32; ++w) total += warps[w][threadIdx.x];
  to[head] = float(total);
}
}  // namespace
}  // namespace df::cuda

void df::chunk_bwd_sums(const ChunkBwdCuda& args, void* stream) {
  const int64_t heads = args.in.shape.HV;
  const dim3 grid(unsigned((heads + cuda::kSumHeads - 1) / cuda::kSumHeads), 2);
  cuda::chunk_bwd_sums_kernel<<<grid, cuda::kSumThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      args, args.in.slots());
}
