// The gate g = -exp(A_log) softplus(a + dt_bias) over a [rows, HV], and with a' = a + dt_bias:
//   da = -dg exp(A_log) sigmoid(a');  dA_log = sum dg g;  ddt_bias = sum da, before da is rounded
//
// CTA = (part of the rows, up to 1024 heads), 256 threads. A thread owns 4 neighbouring heads with
// their constants and walks down the rows; threads are in the order of memory, so that a warp's
// accesses (64 or 128 bits a thread) fill whole sectors. HV that is no multiple of 4, or unaligned
// tensors, are moved element by element by the same threads.
// Backward, a thread's sums go to the CTA's through shared memory (8 KB), row by row of threads in
// a fixed order, and to a partial sum in memory; column_sums adds these in double. Registers: at
// most 64. Bytes an element: e + 4, backward 2 e + 4 (e bytes an element of a). FLOPs: about 40.
// Bound by memory.
#include "common/cuda/pack.cuh"
#include "gated_delta/gate.h"
#include "gated_delta/gate_sums.cuh"
#include "gated_delta/head_gate.cuh"

namespace df::cuda {
namespace {
constexpr int kVec = GateLaunch::kVec, kThreads = GateLaunch::kThreads;

struct GatePlace {
  int64_t head, row, end, step;  // its first head; rows row, row + step, ... < end
  int count;                     // of its heads that exist; 0: nothing to do
};
__device__ inline GatePlace gate_place(const GateLaunch& p) {
  const int64_t block = p.block(), blocks = p.blocks(), rows = kThreads / block;
  const int64_t cta = blockIdx.x / blocks, each = (p.rows + p.ctas() - 1) / p.ctas();
  GatePlace at;
  at.head = (blockIdx.x % blocks * block + threadIdx.x % block) * kVec;
  at.row = cta * each + threadIdx.x / block, at.step = rows;
  at.end = (cta + 1) * each < p.rows ? (cta + 1) * each : p.rows;
  const int64_t left = threadIdx.x < rows * block ? p.HV - at.head : 0;
  at.count = left < 0 ? 0 : left < kVec ? int(left) : kVec;
  return at;
}

template <class E, bool kVectors>
__device__ inline Pack<E, kVec> gate_load(const void* data, int64_t i, int count) {
  Pack<E, kVec> x;
  const E* const from = static_cast<const E*>(data) + i;
  kVectors ? x.load(from) : x.load_some(from, count);
  return x;
}
template <class E, bool kVectors>
__device__ inline void gate_store(const Pack<E, kVec>& x, void* data, int64_t i, int count) {
  E* const to = static_cast<E*>(data) + i;
  kVectors ? x.store(to) : x.store_some(to, count);
}

template <class E, bool kVectors>
__global__ void __launch_bounds__(kThreads, 4)
    gate_fwd_kernel(const __grid_constant__ GateLaunch p) {
  const GatePlace at = gate_place(p);
  if (at.count == 0) return;
  const PreActivation pre{p.A_log, p.dt_bias, 0};
  HeadGate head[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) head[i] = head_gate(pre, at.head + (i < at.count ? i : 0));
#pragma unroll 2
  for (int64_t row = at.row; row < at.end; row += at.step) {
    const int64_t place = row * p.HV + at.head;
    const Pack<E, kVec> a = gate_load<E, kVectors>(p.a.data, place, at.count);
    Pack<float, kVec> g;
#pragma unroll
    for (int i = 0; i < kVec; ++i) g.set(i, gate(head[i], a[i]));
    gate_store<float, kVectors>(g, p.g, place, at.count);
  }
}

template <class E, bool kVectors>
__global__ void __launch_bounds__(kThreads, 4)
    gate_bwd_kernel(const __grid_constant__ GateLaunch p) {
  __shared__ float shared[2 * kVec * kThreads];
  const GatePlace at = gate_place(p);
  const PreActivation pre{p.A_log, p.dt_bias, 0};
  HeadGate head[kVec];
  float sums[2 * kVec] = {};  // of A_log, then of dt_bias
#pragma unroll
  for (int i = 0; i < kVec; ++i)
    if (i < at.count) head[i] = head_gate(pre, at.head + i);
  for (int64_t row = at.row; row < at.end && at.count > 0; row += at.step) {
    const int64_t place = row * p.HV + at.head;
    const Pack<E, kVec> a = gate_load<E, kVectors>(p.a.data, place, at.count);
    const Pack<float, kVec> dg = gate_load<float, kVectors>(p.dg, place, at.count);
    Pack<E, kVec> da;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float x = a[i] + head[i].bias, scaled = dg[i] * head[i].rate;
      const float d = scaled * sigmoid(x);
      da.set(i, d);
      sums[i] += scaled * softplus(x), sums[kVec + i] += d;
    }
    gate_store<E, kVectors>(da, p.da, place, at.count);
  }
#pragma unroll
  for (int i = 0; i < 2 * kVec; ++i) shared[i * kThreads + threadIdx.x] = sums[i];
  __syncthreads();
  const int block = int(p.block());
  if (threadIdx.x >= block) return;
  float* const to = p.partial + blockIdx.x / p.blocks() * 2 * p.HV + at.head;
  for (int i = 0; i < 2 * kVec; ++i) {
    if (i % kVec >= at.count) continue;
    float total = 0;
    for (int r = 0; r < kThreads / block; ++r)
      total += shared[i * kThreads + r * block + threadIdx.x];
    to[i / kVec * p.HV + i % kVec] = total;
  }
}

// fn(Type<E>, kernels with vectors)
template <class Fn>
void gate_dispatch(const GateLaunch& p, Fn fn) {
  const bool vectors = p.HV % kVec == 0 && on_boundary(p.a.data, 16) && on_boundary(p.g, 16) &&
                       on_boundary(p.dg, 16) && on_boundary(p.da, 16);
  switch (p.a.dtype) {
    case DType::f32: return fn(Type<float>{}, vectors);
    case DType::bf16: return fn(Type<bf16>{}, vectors);
    default: return fn(Type<f16>{}, vectors);
  }
}
}  // namespace
}  // namespace df::cuda

void df::gate_fwd_cuda(const GateLaunch& p, void* stream) {
  if (p.rows * p.HV == 0) return;
  cuda::gate_dispatch(p, [&](auto tag, bool vectors) {
    using E = typename decltype(tag)::type;
    auto* kernel = vectors ? &cuda::gate_fwd_kernel<E, true> : &cuda::gate_fwd_kernel<E, false>;
    kernel<<<unsigned(p.ctas() * p.blocks()), cuda::kThreads, 0,
             static_cast<cudaStream_t>(stream)>>>(p);
  });
}
void df::gate_bwd_cuda(const GateLaunch& p, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (p.rows * p.HV != 0)
    cuda::gate_dispatch(p, [&](auto tag, bool vectors) {
      using E = typename decltype(tag)::type;
      auto* kernel = vectors ? &cuda::gate_bwd_kernel<E, true> : &cuda::gate_bwd_kernel<E, false>;
      kernel<<<unsigned(p.ctas() * p.blocks()), cuda::kThreads, 0, stream>>>(p);
    });
  cuda::column_sums(p.partial, p.ctas(), 2 * p.HV,
                    cuda::GateSums{p.HV, p.dA_log, p.ddt_bias, p.A_log.dtype, p.dt_bias.dtype},
                    stream);
}
