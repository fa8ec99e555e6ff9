// Backward of the rotation; frame.h has the equations. Up to 4 planes in one pass over x and g:
//   c = W^T x, e = W^T g, c~ = Rc^T e;  dx = g + W (c~ - e);  dt = sum_k theta_k c~_k x c_k
//   dW^T (or P^T) += u g^T + v x^T, summed in registers over the tokens of the CTA
// More planes (kR = 0, or frame_mma.cuh): the pass writes dx, dt and, for the sums, c and e; then
// frame_products_kernel (bfloat16: frame_products_mma.cuh) reads x and g again. What belongs to
// pairs of planes comes from c and e in frame_pairs.cu.
//
// CTA: 128 threads, one head, a span of tokens (a 3 * 132 / H-th of all, so that 12 warps an SM
// are at work). Groups of lanes as in frame_fwd.cuh, 2 tokens at a time: 4 partial sums a token,
// each half of the group takes the angle of one token. 12 shuffles a plane hand u, v and c~ - e
// back. In the end the CTA's groups are added in order, by shuffles and shared memory.
// Shared memory: 8 r kTile bytes for W, at most 16 KB for the sums, in the same place.
// Registers: 16 x, 16 g, 16 W, 16 kR of sums: at most 168 (kR = 0: 128).
// Bytes: x and g once in, dx once out (6 D in bfloat16), 16 r of c and e, 4 of dt a token and
// head; 8 r D a CTA of sums. FLOPs: 28 r D. Bound by memory up to r = 2, then by FP32 issue.
#pragma once
#include "grape/frame_device.cuh"
#include "grape/frame_products_mma.cuh"

namespace df::cuda {
// Adds the groups' sums [rows][kTile] in order and writes the CTA's part [2 r, D] of the products,
// from row `first`. All threads; sum has 4 kRows kTile floats.
template <class C, int kRows>
__device__ inline void write_products(const FrameCuda& p, float (&P)[kRows][C::kSlice], int lane,
                                      int h, int64_t split, int first, float* sum) {
  const int D = int(p.args.D), rows = 2 * int(p.args.r);
  constexpr int kWarps = C::kThreads / 32;
#pragma unroll
  for (int j = 0; j < kRows; ++j)
#pragma unroll
    for (int n = 0; n < C::kSlice; ++n)
#pragma unroll
      for (int mask = C::kLanes; mask < 32; mask *= 2)
        P[j][n] += __shfl_xor_sync(0xffffffffu, P[j][n], mask);
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 < C::kLanes)
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int n = 0; n < C::kSlice; ++n)
        sum[(warp * kRows + j) * C::kTile + C::channel(lane, n)] = P[j][n];
  __syncthreads();
  float* const to = p.products + (split * p.args.H + h) * rows * D;
  for (int i = threadIdx.x; i < kRows * C::kTile; i += C::kThreads) {
    const int j = i / C::kTile, d = i % C::kTile;
    if (first + j >= rows || d >= D) continue;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += sum[w * kRows * C::kTile + i];
    to[(first + j) * D + d] = total;
  }
}

template <class C, int kR>
__global__ void __launch_bounds__(C::kThreads, kR ? 3 : 4)
    frame_bwd_kernel(const __grid_constant__ FrameCuda p) {
  constexpr int kTokens = 2, kLanes = C::kLanes, kSlice = C::kSlice, kOwners = kLanes / kTokens;
  constexpr int kKept = kR ? kR : 1;
  const int D = int(p.args.D), r = int(p.args.r), H = int(p.args.H);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int h = int(blockIdx.x % H);
  const int64_t split = blockIdx.x / H;
  const int planes = kR ? kR : r < kChunkPlanes<C> ? r : kChunkPlanes<C>;
  const int64_t N = p.args.B * p.args.T, first = split * p.span;
  const int64_t last = first + p.span < N ? first + p.span : N;
  extern __shared__ float4 shared[];
  float* const sW = reinterpret_cast<float*>(shared);
  double* const sTheta = reinterpret_cast<double*>(sW + 2 * planes * C::kTile);
  float P[2 * kKept][kSlice] = {};

  for (int64_t step = first; step < last; step += C::kGroups * kTokens) {
    const int64_t n0 = step + group * kTokens;
    float x[kTokens][kSlice], g[kTokens][kSlice], dx[kTokens][kSlice];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const bool there = n0 + i < last;
      load_slice<C>(p.args.x.data, row_of(p.args, p.args.x, n0 + i, h), D, lane, there, x[i]);
      load_slice<C>(p.args.g.data, row_of(p.args, p.args.g, n0 + i, h), D, lane, there, g[i]);
    }
    if constexpr (kR == 0)
#pragma unroll
      for (int i = 0; i < kTokens; ++i)
#pragma unroll
        for (int n = 0; n < kSlice; ++n) dx[i][n] = g[i][n];
    const int64_t mine = n0 + lane / kOwners;
    const double t = mine < last ? p.args.t[mine] : 0;
    float dt = 0, d0[kKept], d1[kKept];

    for (int k0 = 0; k0 < r; k0 += planes) {
      if (step == first || planes < r) {
        if (step != first || k0) __syncthreads();
        stage_frame<C>(p, h, k0, planes, sW, sTheta);
        __syncthreads();
      }
      const int here = kR ? kR : r - k0 < planes ? r - k0 : planes;
#pragma unroll kKept
      for (int k = 0; k < here; ++k) {
        const int kept = kR ? k : 0;
        float w0[kSlice], w1[kSlice], v[kTokens][4] = {};
        load_column<C>(sW, 2 * k, lane, w0);
        load_column<C>(sW, 2 * k + 1, lane, w1);
#pragma unroll
        for (int i = 0; i < kTokens; ++i)
#pragma unroll
          for (int n = 0; n < kSlice; ++n) {
            v[i][0] += w0[n] * x[i][n];
            v[i][1] += w1[n] * x[i][n];
            v[i][2] += w0[n] * g[i][n];
            v[i][3] += w1[n] * g[i][n];
          }
        scatter_sums<kLanes>(v, lane);
        const float c0 = v[0][0], c1 = v[0][1], e0 = v[0][2], e1 = v[0][3];
        const Angle at(t, sTheta[k]);
        const float turn = at.turn(), less_one = at.less_one(), theta = float(sTheta[k]);
        d0[kept] = e0 * less_one - e1 * turn, d1[kept] = e0 * turn + e1 * less_one;
        dt += theta * ((e0 + d0[kept]) * c1 - (e1 + d1[kept]) * c0);
        if (p.coefs && lane % kOwners == 0 && mine < last && k0 + k < r)
          __stcg(reinterpret_cast<float4*>(p.coefs) + (mine * H + h) * r + k0 + k,
                 make_float4(c0, c1, e0, e1));
        if constexpr (kR == 0) {
#pragma unroll
          for (int i = 0; i < kTokens; ++i) {
            const float a0 = from_token<kLanes, kTokens>(d0[0], i);
            const float a1 = from_token<kLanes, kTokens>(d1[0], i);
#pragma unroll
            for (int n = 0; n < kSlice; ++n) dx[i][n] += w0[n] * a0 + w1[n] * a1;
          }
        } else if (p.products) {
          const Outer o(at, c0, c1, e0, e1, float(t), theta, p.args.generator);
#pragma unroll
          for (int i = 0; i < kTokens; ++i) {
            const float u0 = from_token<kLanes, kTokens>(o.u0, i);
            const float u1 = from_token<kLanes, kTokens>(o.u1, i);
            const float v0 = from_token<kLanes, kTokens>(o.v0, i);
            const float v1 = from_token<kLanes, kTokens>(o.v1, i);
#pragma unroll
            for (int n = 0; n < kSlice; ++n) {
              P[2 * kept][n] += u0 * g[i][n] + v0 * x[i][n];
              P[2 * kept + 1][n] += u1 * g[i][n] + v1 * x[i][n];
            }
          }
        }
      }
    }
    if constexpr (kR > 0) {
#pragma unroll
      for (int k = 0; k < kR; ++k) {
        float w0[kSlice], w1[kSlice];
        load_column<C>(sW, 2 * k, lane, w0);
        load_column<C>(sW, 2 * k + 1, lane, w1);
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
          const float a0 = from_token<kLanes, kTokens>(d0[k], i);
          const float a1 = from_token<kLanes, kTokens>(d1[k], i);
#pragma unroll
          for (int n = 0; n < kSlice; ++n)
            dx[i][n] = (k ? dx[i][n] : g[i][n]) + w0[n] * a0 + w1[n] * a1;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      if (n0 + i < last) store_slice<C>(p.args.y, ((n0 + i) * H + h) * D, D, lane, dx[i]);
    if (p.args.dt && lane % kOwners == 0 && mine < last)
      static_cast<float*>(p.args.dt)[mine * H + h] = dt;
  }
  if constexpr (kR > 0)
    if (p.products) write_products<C>(p, P, lane, h, split, 0, sW);
}

// For more than 4 planes: 4 of them a CTA, from x, g and what the pass above has left of c and e.
template <class C>
__global__ void __launch_bounds__(C::kThreads, 3)
    frame_products_kernel(const __grid_constant__ FrameCuda p) {
  constexpr int kPlanes = kFrameFused, kTokens = C::kThreads / kPlanes;
  constexpr int kLanes = C::kLanes, kSlice = C::kSlice;
  const int D = int(p.args.D), r = int(p.args.r), H = int(p.args.H);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int chunks = (r + kPlanes - 1) / kPlanes;
  const int h = int(blockIdx.x % H), k0 = int(blockIdx.x / H % chunks) * kPlanes;
  const int64_t split = blockIdx.x / H / chunks, N = p.args.B * p.args.T;
  const int64_t first = split * p.span, last = first + p.span < N ? first + p.span : N;
  extern __shared__ float4 sOuter[];  // [kTokens][kPlanes]; then the sums
  float P[2 * kPlanes][kSlice] = {};
  const int k = k0 + threadIdx.x % kPlanes;
  const double theta = k < r ? p.args.theta[int64_t(h) * r + k] : 0;
  for (int64_t step = first; step < last; step += kTokens) {
    const int64_t n = step + threadIdx.x / kPlanes;
    float4 o = make_float4(0, 0, 0, 0);
    if (n < last && k < r) {
      const float4 c = __ldcg(reinterpret_cast<const float4*>(p.coefs) + (n * H + h) * r + k);
      const double t = p.args.t[n];
      const Outer outer(Angle(t, theta), c.x, c.y, c.z, c.w, float(t), float(theta),
                        p.args.generator);
      o = make_float4(outer.u0, outer.u1, outer.v0, outer.v1);
    }
    __syncthreads();
    sOuter[threadIdx.x] = o;
    __syncthreads();
    for (int i = group; i < kTokens; i += C::kGroups) {
      float x[kSlice], g[kSlice];
      const bool there = step + i < last;
      load_slice<C>(p.args.x.data, row_of(p.args, p.args.x, step + i, h), D, lane, there, x);
      load_slice<C>(p.args.g.data, row_of(p.args, p.args.g, step + i, h), D, lane, there, g);
#pragma unroll
      for (int q = 0; q < kPlanes; ++q) {
        const float4 a = sOuter[i * kPlanes + q];
#pragma unroll
        for (int m = 0; m < kSlice; ++m) {
          P[2 * q][m] += a.x * g[m] + a.z * x[m];
          P[2 * q + 1][m] += a.y * g[m] + a.w * x[m];
        }
      }
    }
  }
  write_products<C>(p, P, lane, h, split, 2 * k0, reinterpret_cast<float*>(sOuter));
}

template <class C>
void frame_products_launch(const FrameCuda& p, void* stream) {
  const int64_t chunks = (p.args.r + kFrameFused - 1) / kFrameFused;
  const size_t bytes = 4 * 2 * kFrameFused * C::kTile * sizeof(float);
  frame_products_kernel<C>
      <<<p.splits * chunks * p.args.H, C::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(p);
}

template <class C, int kR>
void frame_bwd_kernel_launch(const FrameCuda& p, void* stream) {
  const int64_t r = p.args.r, planes = kR ? kR : r < kChunkPlanes<C> ? r : kChunkPlanes<C>;
  const size_t frame = planes * (2 * C::kTile * sizeof(float) + sizeof(double));
  const size_t sums = 4 * 2 * kR * C::kTile * sizeof(float), bytes = sums < frame ? frame : sums;
  frame_bwd_kernel<C, kR>
      <<<p.splits * p.args.H, C::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(p);
}

template <class E>
void frame_bwd_launch(const FrameCuda& p, void* stream) {
  with_frame_config<E>(p, [&](auto config) {
    using C = decltype(config);
    if constexpr (C::kLanes < 32) {
      const int64_t r = p.args.r;
      if (r == 1) return frame_bwd_kernel_launch<C, 1>(p, stream);
      if (r == 2) return frame_bwd_kernel_launch<C, 2>(p, stream);
      if (r == 3 || r == 4) return frame_bwd_kernel_launch<C, 4>(p, stream);
    }
    bool tensor_cores = false;
    if constexpr (sizeof(E) == 2) tensor_cores = frame_mma_launch<E, true>(p, stream);
    if (!tensor_cores) frame_bwd_kernel_launch<C, 0>(p, stream);
    if (!p.products) return;
    if constexpr (std::is_same_v<E, bf16>)
      if (tensor_cores) return frame_products_mma_launch(p, stream);
    frame_products_launch<C>(p, stream);
  });
}
}  // namespace df::cuda
