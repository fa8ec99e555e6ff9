// Forward of the rotation in r planes of a head:
//   y = x + W (Rc(t theta) - I) W^T x;  a plane: c = (w0.x, w1.x), turned by f = t theta
//   y += w0 (c0 (cos f - 1) + c1 sin f) + w1 (c1 (cos f - 1) - c0 sin f)
//
// CTA: 128 threads, one head, a span of tokens (as long as fills the SMs with 4 CTAs, at most 16
// steps). A group of 8, 16 or 32 lanes (D <= 64, 128, 256) has 4 tokens at a time, 8 channels of
// each a lane, x and y in registers: one step of the CTA is 64, 32 or 16 tokens.
// For each plane, read once for 4 tokens: 8 partial sums a lane are summed by halving the tokens
// a lane has (10 shuffles with 16 lanes, not 32), so that a quarter of the group ends with c of one
// token and takes its angle; 8 shuffles hand the plane's change back.
// Rows that are not 16-byte aligned or no multiple of a vector take single elements and 32 lanes.
// Shared memory: W of up to 32 KB as float [2 planes][kTile] + theta; more planes come in
// chunks. Reads of W are free of bank conflicts. Registers: 64 of x and y, 16 of W; at most 128.
// Bytes: x once in, y once out (4 D in bfloat16), t 8 a token and head (L2), W once a CTA.
// FLOPs: 8 r D a token and head, and about 60 instructions an angle for each plane, 12 of them
// float64. Bound by memory up to r = 4 (D = 128, bfloat16), then by FP32 issue.
#pragma once
#include "grape/frame_device.cuh"

namespace df::cuda {
template <class C>
__global__ void __launch_bounds__(C::kThreads, 4)
    frame_fwd_kernel(const __grid_constant__ FrameCuda p) {
  constexpr int kTokens = 4, kLanes = C::kLanes, kSlice = C::kSlice;
  const int D = int(p.args.D), r = int(p.args.r), H = int(p.args.H);
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  const int h = int(blockIdx.x % H), planes = r < kChunkPlanes<C> ? r : kChunkPlanes<C>;
  const int64_t N = p.args.B * p.args.T, first = blockIdx.x / H * p.span;
  const int64_t last = first + p.span < N ? first + p.span : N;
  extern __shared__ float4 shared[];
  float* const sW = reinterpret_cast<float*>(shared);
  double* const sTheta = reinterpret_cast<double*>(sW + 2 * planes * C::kTile);

  for (int64_t step = first; step < last; step += C::kGroups * kTokens) {
    const int64_t n0 = step + group * kTokens;
    float x[kTokens][kSlice], y[kTokens][kSlice];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int64_t row = row_of(p.args, p.args.x, n0 + i, h);
      load_slice<C>(p.args.x.data, row, D, lane, n0 + i < last, x[i]);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
#pragma unroll
      for (int n = 0; n < kSlice; ++n) y[i][n] = x[i][n];
    const int64_t mine = n0 + lane / (kLanes / kTokens);
    const double t = mine < last ? p.args.t[mine] : 0;

    for (int k0 = 0; k0 < r; k0 += planes) {
      if (step == first || planes < r) {
        if (step != first || k0) __syncthreads();
        stage_frame<C>(p, h, k0, planes, sW, sTheta);
        __syncthreads();
      }
      const int here = r - k0 < planes ? r - k0 : planes;
      for (int k = 0; k < here; ++k) {
        float w0[kSlice], w1[kSlice], c[kTokens][2] = {};
        load_column<C>(sW, 2 * k, lane, w0);
        load_column<C>(sW, 2 * k + 1, lane, w1);
#pragma unroll
        for (int i = 0; i < kTokens; ++i)
#pragma unroll
          for (int n = 0; n < kSlice; ++n) {
            c[i][0] += w0[n] * x[i][n];
            c[i][1] += w1[n] * x[i][n];
          }
        scatter_sums<kLanes>(c, lane);
        const Angle at(t, sTheta[k]);
        const float turn = at.turn(), less_one = at.less_one();
        const float d0 = c[0][0] * less_one + c[0][1] * turn;
        const float d1 = c[0][1] * less_one - c[0][0] * turn;
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
          const float a0 = from_token<kLanes, kTokens>(d0, i);
          const float a1 = from_token<kLanes, kTokens>(d1, i);
#pragma unroll
          for (int n = 0; n < kSlice; ++n) y[i][n] += w0[n] * a0 + w1[n] * a1;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i)
      if (n0 + i < last) store_slice<C>(p.args.y, ((n0 + i) * H + h) * D, D, lane, y[i]);
  }
}

template <class E>
void frame_fwd_launch(const FrameCuda& p, void* stream) {
  with_frame_config<E>(p, [&](auto config) {
    using C = decltype(config);
    FrameCuda call = p;
    spread_steps(call, C::kGroups * 4, 4, 16);
    const int64_t planes = p.args.r < kChunkPlanes<C> ? p.args.r : kChunkPlanes<C>;
    const size_t bytes = planes * (2 * C::kTile * sizeof(float) + sizeof(double));
    frame_fwd_kernel<C>
        <<<call.splits * p.args.H, C::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(call);
  });
}
}  // namespace df::cuda
