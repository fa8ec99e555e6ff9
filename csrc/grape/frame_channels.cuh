// Rotation of neighbouring channels (W = I), forward and backward:
//   y_2k = x_2k cos f + x_2k+1 sin f, y_2k+1 = x_2k+1 cos f - x_2k sin f,   f = t theta_k
// and with g: dx is the same by -f; with c~ = dx: dt = sum_k theta_k (c~_2k x_2k+1 - c~_2k+1 x_2k),
// dtheta_k the same summed over tokens with t.
//
// CTA: 4 warps, one head, a span of tokens; a warp has one token at a time, a lane the planes
// lane, lane + 32, ... (at most 4). Channels beyond 2 r are copied.
// Shared memory: 2 KB, for the warps' parts of dtheta, added in their order.
// Registers: 4 of dtheta, 4 of a plane; at most 64.
// Bytes: x (backward: and g) once in, y once out, t 8 a token and head (L2). FLOPs: about 70 a
// plane, 12 of them float64. Bound by memory on GPUs with fast float64.
#pragma once
#include "common/cuda/reduce.cuh"
#include "grape/frame_device.cuh"

namespace df::cuda {
template <class E, bool kBackward>
__global__ void __launch_bounds__(128) frame_channels_kernel(const __grid_constant__ FrameCuda p) {
  constexpr int kWarps = 4, kMost = kFrameMaxD / 2 / 32;
  __shared__ float sSum[kWarps][kMost * 32];
  const int D = int(p.args.D), r = int(p.args.r), H = int(p.args.H);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, h = int(blockIdx.x % H);
  const int64_t split = blockIdx.x / H, N = p.args.B * p.args.T, first = split * p.span;
  const int64_t last = first + p.span < N ? first + p.span : N;
  const double* const theta = p.args.theta + int64_t(h) * r;
  const FrameRows& source = kBackward ? p.args.g : p.args.x;
  float dtheta[kMost] = {};
  for (int64_t n = first + warp; n < last; n += kWarps) {
    const E* const from = static_cast<const E*>(source.data) + row_of(p.args, source, n, h);
    const E* const x = static_cast<const E*>(p.args.x.data) + row_of(p.args, p.args.x, n, h);
    E* const to = static_cast<E*>(p.args.y) + (n * H + h) * D;
    const double t = p.args.t[n];
    float dt = 0;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const int k = i * 32 + lane;
      if (k >= r) continue;
      const Angle at(t, theta[k]);
      const float turn = kBackward ? -at.turn() : at.turn(), less_one = at.less_one();
      const float c0 = to_float(from[2 * k]), c1 = to_float(from[2 * k + 1]);
      const float y0 = c0 + (c0 * less_one + c1 * turn), y1 = c1 + (c1 * less_one - c0 * turn);
      from_float(y0, to + 2 * k), from_float(y1, to + 2 * k + 1);
      if constexpr (kBackward) {
        const float rate = y0 * to_float(x[2 * k + 1]) - y1 * to_float(x[2 * k]);
        dt += float(theta[k]) * rate, dtheta[i] += float(t) * rate;
      }
    }
    for (int d = 2 * r + lane; d < D; d += 32) to[d] = from[d];
    if constexpr (kBackward) {
      dt = lane_sum<32>(dt);
      if (p.args.dt && lane == 0) static_cast<float*>(p.args.dt)[n * H + h] = dt;
    }
  }
  if constexpr (kBackward) {
    if (!p.products) return;
#pragma unroll
    for (int i = 0; i < kMost; ++i) sSum[warp][i * 32 + lane] = dtheta[i];
    __syncthreads();
    for (int k = threadIdx.x; k < r; k += 32 * kWarps)
      p.products[(split * H + h) * r + k] = sSum[0][k] + sSum[1][k] + sSum[2][k] + sSum[3][k];
  }
}

template <class E>
void frame_channels_launch(const FrameCuda& p, bool backward, void* stream) {
  const auto grid = static_cast<unsigned>(p.splits * p.args.H);
  const auto on = static_cast<cudaStream_t>(stream);
  backward ? frame_channels_kernel<E, true><<<grid, 128, 0, on>>>(p)
           : frame_channels_kernel<E, false><<<grid, 128, 0, on>>>(p);
}
}  // namespace df::cuda
