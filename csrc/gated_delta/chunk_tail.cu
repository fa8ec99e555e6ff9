// Zeroes what lies behind the last of packed sequences: the tokens of a padding tail belong to none
// of them, so that no other kernel writes there, neither o nor gradients.
//   [first, T) of each tensor of [1, T, ...], first = cu_seqlens[N]
// Where the tail begins is known on the device only: the grid is made for all T tokens of the
// widest tensor, at most 8 blocks an SM, and most blocks find nothing to do.
//   a block: 256 threads, a grid-stride loop over the 16-byte words of each tensor in turn; the
//   bytes before the first whole word and behind the last one are written one by one
//   no shared memory; bound by the bandwidth of writes, or by the launch when there is no tail
#include "gated_delta/chunk_device.cuh"
#include "gated_delta/chunk_fwd_cuda.h"

namespace df {
namespace cuda {
__global__ void chunk_zero_tail_kernel(const __grid_constant__ ChunkTail p) {
  const int64_t first = token_offset(p.in, p.in.N);
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * blockDim.x;
#pragma unroll
  for (const TailRows& x : p.rows) {
    if (!x.data) continue;
    char* const from = static_cast<char*>(x.data) + first * x.bytes;
    char* const to = static_cast<char*>(x.data) + p.in.shape.T * x.bytes;
    char* const words = from + (-reinterpret_cast<uintptr_t>(from) & 15);
    for (int64_t i = thread; from + i < to && from + i < words; i += threads) from[i] = 0;
    const int64_t count = words < to ? (to - words) / 16 : 0;
    for (int64_t i = thread; i < count; i += threads)
      reinterpret_cast<uint4*>(words)[i] = uint4{0, 0, 0, 0};
    for (char* at = words + 16 * count + thread; at < to; at += threads) *at = 0;
  }
}
}  // namespace cuda

void chunk_zero_tail_cuda(const ChunkTail& p, void* stream) {
  int64_t bytes = 0;
  for (const TailRows& x : p.rows)
    if (x.data && x.bytes > bytes) bytes = x.bytes;
  const int64_t blocks = (bytes * p.in.shape.T + 4095) / 4096;
  if (blocks == 0) return;
  cuda::chunk_zero_tail_kernel<<<unsigned(blocks < 1056 ? blocks : 1056), 256, 0,
                                 static_cast<cudaStream_t>(stream)>>>(p);
}
}  // namespace df
