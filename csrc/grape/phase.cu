// The contextual phase (phase.h): exclusive running sums over the tokens of a sequence,
//   phi_t = initial + sum_{s<t} omega_s  (int64 units of 2^-40),  d omega_s = sum_{t>s} d phi_t
//
// CTA = (sequence, phase), 256 threads; it walks over tiles of 2048 tokens, backward from the end.
// A thread has 8 neighbouring tokens of a tile in registers, requested together; their sum goes
// through a scan over the warp's lanes (shuffles) and one over the warps (shared memory), and the
// tile's total is the next one's start. Integers: the same bits for every division into chunks.
// Doubles: a fixed order, so the same bits in every launch.
//
// Shared memory 64 bytes; at most 128 registers, no spills. Bytes: an element in, 8 out, a token
// and phase; for one phase whole sectors, for several the CTAs of neighbouring ones share sectors
// in the L2 cache. FLOPs: a conversion and some 15 additions a token. Bound by the latency of a
// tile, about 1 us: some 64 us at 128 K tokens, beside a rotation of that length of several
// hundred.
#include "common/cuda/load.cuh"
#include "grape/phase.h"

namespace df::cuda {
namespace {
constexpr int kThreads = 256, kItems = 8, kTile = kThreads * kItems, kWarps = kThreads / 32;

// Items of a thread: tokens first, first + step, ..., zero outside of the sequence.
__device__ inline void load_items(const PhaseArgs& p, const PhaseRow& row, int64_t m, int64_t first,
                                  int step, double (&x)[kItems]) {
  const int64_t begin = row.batch * p.b + m * p.m;
  const auto load = [&](auto* typed) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int64_t t = first + i * step;
      const bool inside = t >= row.begin && t < row.end;
      if constexpr (sizeof(*typed) == 8)
        x[i] = inside ? typed[begin + t * p.t] : 0;
      else
        x[i] = inside ? double(to_float(typed[begin + t * p.t])) : 0;
    }
  };
  switch (p.type) {
    case DType::f32: return load(static_cast<const float*>(p.in));
    case DType::f64: return load(static_cast<const double*>(p.in));
    case DType::bf16: return load(static_cast<const bf16*>(p.in));
    default: return load(static_cast<const f16*>(p.in));
  }
}

template <class T>
struct Scan {
  T before, total;  // the sum of earlier threads, and of all
};
template <class T>
__device__ inline Scan<T> cta_scan(T x, T* sWarps) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  T sum = x;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const T other = __shfl_up_sync(0xffffffffu, sum, d);
    if (lane >= d) sum += other;
  }
  const T earlier = __shfl_up_sync(0xffffffffu, sum, 1);
  if (lane == 31) sWarps[warp] = sum;
  __syncthreads();
  Scan<T> result{lane == 0 ? T(0) : earlier, 0};
  T offset = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) offset = result.total;
    result.total += sWarps[w];
  }
  result.before += offset;
  __syncthreads();
  return result;
}

__global__ void __launch_bounds__(kThreads) phase_fwd_kernel(const __grid_constant__ PhaseArgs p) {
  __shared__ long long sWarps[kWarps];
  const int64_t n = blockIdx.x / p.M, m = blockIdx.x % p.M;
  const PhaseRow row = phase_row(p, n);
  long long start = p.initial ? p.initial[n * p.M + m] : 0;
  for (int64_t t0 = row.begin; t0 < row.end; t0 += kTile) {
    const int64_t first = t0 + int64_t(threadIdx.x) * kItems;
    double omega[kItems];
    load_items(p, row, m, first, 1, omega);
    long long units[kItems], sum = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum += units[i] = __double2ll_rn(omega[i] / kPhaseUnit);
    const Scan<long long> scan = cta_scan(sum, sWarps);
    long long phi = start + scan.before;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (first + i < row.end)
        p.out[(row.batch * p.T + first + i) * p.M + m] = double(phi) * kPhaseUnit;
      phi += units[i];
    }
    start += scan.total;
  }
  if (threadIdx.x == 0) p.final[n * p.M + m] = start;
}

__global__ void __launch_bounds__(kThreads) phase_bwd_kernel(const __grid_constant__ PhaseArgs p) {
  __shared__ double sWarps[kWarps];
  const int64_t n = blockIdx.x / p.M, m = blockIdx.x % p.M;
  const PhaseRow row = phase_row(p, n);
  double start = 0;
  for (int64_t t0 = row.end; t0 > row.begin; t0 -= kTile) {  // tokens before t0, the last one first
    const int64_t last = t0 - 1 - int64_t(threadIdx.x) * kItems;
    double d[kItems], sum = 0;
    load_items(p, row, m, last, -1, d);
#pragma unroll
    for (int i = 0; i < kItems; ++i) sum += d[i];
    const Scan<double> scan = cta_scan(sum, sWarps);
    double after = start + scan.before;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (last - i >= row.begin) p.out[(row.batch * p.T + last - i) * p.M + m] = after;
      after += d[i];
    }
    start += scan.total;
  }
}
}  // namespace
}  // namespace df::cuda

void df::phase_fwd_cuda(const PhaseArgs& p, void* stream) {
  cuda::phase_fwd_kernel<<<p.N * p.M, cuda::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
}
void df::phase_bwd_cuda(const PhaseArgs& p, void* stream) {
  cuda::phase_bwd_kernel<<<p.N * p.M, cuda::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
}
