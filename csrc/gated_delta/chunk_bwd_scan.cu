// The dS that leaves each segment of a chain, from the last segment to the first (gated_delta.md,
// 2.7): with the summaries dS^T_in = dS^T_out M + dH^T of all segments, dS^T_out takes the place of
// dH^T, and dS^T_in is that of the segment before.
//
// CTA = (sequence, value head, 64 rows of dS^T), 128 threads: 16 rows a warp, all of K in registers
// (K / 2 of them), as three products of TF32 with an error of float's. dS^T_out is the operand A
// from shared memory, where only its own warp reads it; M comes by 32 rows, the next while one is
// used. Shared memory: 256 K for dS^T, 2 x 128 K for M: 64 KB at K = 128, 128 KB at K = 256.
// Registers: K / 2 and about 60. Bytes a segment and head: 4 K (K + 2 V), M once for each tile of
// V; FLOPs 2 K K V. Bound by latency: a few microseconds a segment.
#include "common/cuda/mma_sm80.cuh"
#include "gated_delta/chunk_bwd_cuda.h"
#include "gated_delta/chunk_state.cuh"

namespace df::cuda {
namespace {
template <int kK>
struct Scan {
  static constexpr int kRows = 32;  // of M at a time
  using State = Tile<float, 64, kK>;
  using Slab = Tile<float, kRows, kK>;
  static constexpr int kBytes = State::kBytes + 2 * Slab::kBytes;
  const ChunkBwdCuda& p;
  uint32_t shared;
  int n, head, v0, Kp;

  __device__ Slab slab(int i) const { return {shared + State::kBytes + i % 2 * Slab::kBytes}; }
  __device__ float* summary(int segment) const {
    const int64_t at = (int64_t(n) * p.segments + segment) * p.in.shape.HV + head;
    return p.summaries + at * ((pad64(p.in.shape.V) + Kp) * Kp);
  }
  __device__ void request(int segment, int i) const {
    const float* M = summary(segment) + (pad64(p.in.shape.V) + i * kRows) * Kp;
    if (i * kRows < Kp) load_tile<true, 128>(slab(i), M, Kp, kRows, Kp, threadIdx.x);
    cp_async_commit();
  }
  // fn(elements (row, col) and (row, col + 1) of a summary, those of the accumulator)
  template <class Fn>
  __device__ void each_pair(float* rows, float (&c)[kK / 8][4], Fn fn) const {
#pragma unroll
    for (int j = 0; j < kK / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int col = fragment_col(j, 0);
        if (col < Kp)
          fn(reinterpret_cast<float2*>(rows + (v0 + fragment_row(2 * half)) * Kp + col),
             c[j][2 * half], c[j][2 * half + 1]);
      }
  }
  __device__ void run() const {
    Accumulator<kK> dS;
    clear<kK>(dS);
    const ChunkShape& s = p.in.shape;
    if (p.d_final_state)
      load_state(p.d_final_state + (n * s.HV + head) * s.K * s.V, p.in.state_v_first, s, v0, dS);
    const State state{shared};
    for (int segment = p.segments - 1; segment >= 0; --segment) {
      request(segment, 0);
      store_tile<kK>(dS, state);
      __syncwarp();
      each_pair(summary(segment), dS, [](float2* at, float& x, float& y) {
        const float2 before = *at;
        *at = {x, y}, x = before.x, y = before.y;
      });
      if (segment == 0) return;
      for (int i = 0; i * kRows < Kp; ++i) {
        request(segment, i + 1);
        cp_async_wait<1>();
        __syncthreads();
        Sm80::mma<kK, kRows>(dS, state.along_k().from(0, i * kRows), slab(i).along_mn());
        __syncthreads();
      }
    }
  }
};

template <int kK>
__global__ void __launch_bounds__(128, 1)
    chunk_bwd_scan_kernel(const __grid_constant__ ChunkBwdCuda p) {
  extern __shared__ __align__(1024) char memory[];
  const int tiles = int(pad64(p.in.shape.V)) / 64, chain = int(blockIdx.x) / tiles;
  const int HV = int(p.in.shape.HV);
  Scan<kK>{p,          shared_address(memory),       chain / HV,
           chain % HV, int(blockIdx.x) % tiles * 64, int(pad64(p.in.shape.K))}
      .run();
}

template <int kK>
int chunk_bwd_scan_launch(const ChunkBwdCuda& p, void* stream) {
  constexpr int kBytes = Scan<kK>::kBytes;
  const cudaError_t e = cudaFuncSetAttribute(chunk_bwd_scan_kernel<kK>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (e != cudaSuccess) return e;
  const int64_t blocks = p.in.N * p.in.shape.HV * (pad64(p.in.shape.V) / 64);
  chunk_bwd_scan_kernel<kK>
      <<<unsigned(blocks), 128, kBytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaSuccess;
}
}  // namespace
}  // namespace df::cuda

int df::chunk_bwd_scan(const ChunkBwdCuda& args, void* stream) {
  if (args.in.shape.K <= 64) return cuda::chunk_bwd_scan_launch<64>(args, stream);
  if (args.in.shape.K <= 128) return cuda::chunk_bwd_scan_launch<128>(args, stream);
  return cuda::chunk_bwd_scan_launch<256>(args, stream);
}
