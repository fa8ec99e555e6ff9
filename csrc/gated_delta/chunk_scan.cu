// The states that enter the segments of a sequence, from what each segment makes of a state
// (chunk_segments.h): one step a segment,
//   S_in(j + 1)^T = S_in(j)^T M_j^T + H_j^T
// A CTA of 128 threads has one value head of one sequence and 64 rows of S^T; it walks along the
// segments. S^T is the operand A, a tile of shared memory of which each warp writes and reads its
// own 16 rows; M^T comes in tiles of 32 rows, one ahead, by cp.async, as operand B along its
// columns. Products are 3xTF32, sums fp32: the hand-over keeps fp32 accuracy.
//   shared memory: S^T 64 x K and two tiles of 32 x K floats: 128 KB for K = 256
//   registers: K / 2 for the sum; 255 at K = 256
//   a step, K = 128, 64 rows: 2.1 MFLOP for 64 KB of M^T (the tiles of V find them in L2), and 64
//   KB of states; bound by the latency of its tiles, K / 32 a step
#include "common/cuda/mma_sm80.cuh"
#include "gated_delta/chunk_device.cuh"
#include "gated_delta/chunk_segments.h"

namespace df {
namespace cuda {
template <int kK>
struct Scan {
  using State = Tile<float, 64, kK>;
  using Rows = Tile<float, 32, kK>;
  static constexpr int kShared = State::kBytes + 2 * Rows::kBytes;

  const ChunkScan& p;
  uint32_t base;
  int64_t head;
  int v0;
  float S[kK / 8][4];

  __device__ State state() const { return {base}; }
  __device__ Rows rows(int block) const {
    return {base + State::kBytes + uint32_t(block % 2) * Rows::kBytes};
  }
  __device__ int K() const { return int(pad64(p.in.shape.K)); }

  // fn(pair of elements in memory, pair in registers) for this thread's part of a slot's states
  template <class Fn>
  __device__ void each_pair(int64_t slot, Fn fn) {
    float* const at =
        p.segments.states + ((slot * p.in.shape.HV + head) * pad64(p.in.shape.V) + v0) * K();
#pragma unroll
    for (int n = 0; n < kK / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (8 * n < K())
          fn(reinterpret_cast<float2*>(at + fragment_row(2 * half) * K() + fragment_col(n, 0)),
             S[n][2 * half], S[n][2 * half + 1]);
  }
  __device__ void load(int64_t slot) {
    clear<kK>(S);
    each_pair(slot, [](const float2* at, float& x, float& y) { x = at->x, y = at->y; });
  }
  // S of this slot to memory, what stood there to registers
  __device__ void exchange(int64_t slot) {
    each_pair(slot, [](float2* at, float& x, float& y) {
      const float2 before = *at;
      *at = {x, y};
      x = before.x, y = before.y;
    });
  }
  __device__ void store(int64_t slot) {
    each_pair(slot, [](float2* at, float& x, float& y) { *at = {x, y}; });
  }

  __device__ void load_rows(int64_t slot, int block) const {
    const float* const from =
        p.segments.transitions + ((slot * p.in.shape.HV + head) * K() + 32 * block) * K();
    load_tile<true, 128>(rows(block), from, K(), K() - 32 * block, K(), threadIdx.x);
    cp_async_commit();
  }
  // S <- S M^T + what stands in the slot's states; S goes there
  __device__ void step(int64_t slot) {
    __syncwarp();
    store_tile<kK>(S, state());
    __syncwarp();
    exchange(slot);
    load_rows(slot, 0);
#pragma unroll 1
    for (int block = 0; block < kK / 32; ++block) {
      if (block + 1 < kK / 32)
        load_rows(slot, block + 1), cp_async_wait<1>();
      else
        cp_async_wait<0>();
      __syncthreads();
#pragma unroll 1
      for (int c = 0; c < 32; c += 8)  // unrolled, loads ahead would take too many registers
        Sm80::mma<kK, 8>(S, state().along_k().from(0, 32 * block + c),
                         rows(block).along_mn().from(c, 0));
      __syncthreads();
    }
  }

  // Segments [first, first + count) of a sequence.
  __device__ void run(int64_t first, int64_t count) {
    if (count < 2) return;
    const int64_t start = p.backward ? first + count - 1 : first, next = p.backward ? -1 : 1;
    load(start);
    for (int64_t j = 1; j + 1 < count; ++j) step(start + j * next);
    store(start + (count - 1) * next);
  }
};

template <int kK>
__global__ __launch_bounds__(128, 1) void chunk_scan_kernel(const __grid_constant__ ChunkScan p) {
  extern __shared__ __align__(1024) char raw[];
  const ChunkShape& shape = p.in.shape;
  const int64_t tiles = pad64(shape.V) / 64, row = blockIdx.x / tiles;
  const int64_t tokens = shape.C * p.segments.chunks;
  const Span s = sequence_span(p.in, row / shape.HV, tokens);
  Scan<kK> scan{p, shared_address(raw) & ~1023u, row % shape.HV, int(blockIdx.x % tiles) * 64};
  scan.run(s.slot, (s.end - s.begin + tokens - 1) / tokens);
}

template <int kK>
void chunk_scan_launch(const ChunkScan& p, void* stream) {
  const int64_t blocks = pad64(p.in.shape.V) / 64 * p.in.shape.HV * p.in.N;
  cudaFuncSetAttribute(chunk_scan_kernel<kK>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       Scan<kK>::kShared);
  chunk_scan_kernel<kK>
      <<<unsigned(blocks), 128, Scan<kK>::kShared, static_cast<cudaStream_t>(stream)>>>(p);
}
}  // namespace cuda

void chunk_scan_cuda(const ChunkScan& p, void* stream) {
  if (p.in.shape.K <= 64) return cuda::chunk_scan_launch<64>(p, stream);
  if (p.in.shape.K <= 128) return cuda::chunk_scan_launch<128>(p, stream);
  cuda::chunk_scan_launch<256>(p, stream);
}
}  // namespace df
