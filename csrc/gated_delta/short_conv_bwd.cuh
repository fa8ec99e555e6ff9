// Gradients of the short convolution; its equations and design are in short_conv.cuh.
#pragma once
#include "common/cuda/column_sums.cuh"
#include "gated_delta/short_conv.cuh"

namespace df::cuda {
// silu'(z), or 1
__device__ inline float conv_slope(bool silu, float z) {
  const float s = sigmoid(z);
  return silu ? s * (1 + z * (1 - s)) : 1;
}

// What the final state passes on to channel c at token t, for a sequence of tokens before `last`.
__device__ inline float conv_passed(const ConvDeviceBwd& p, int64_t n, int64_t c, int64_t t,
                                    int64_t last) {
  const int64_t slot = t - last + p.in.W - 1;
  if (!p.d_final.data || slot < 0) return 0;
  return load_any(p.d_final, (n * p.in.D + c) * (p.in.W - 1) + slot);
}

// A thread's state of the walk: rows[k] of x at token t - k, dz[k] of token t + k.
template <class C>
struct ConvWalk {
  float tap[C::kTaps][C::kVec], bias[C::kVec];
  typename C::Row rows[C::kTaps];  // as in memory, which takes half of the registers in 16 bits
  float dz[C::kTaps][C::kVec];
  float sums[C::kTaps + 1][C::kVec];  // the last one is the bias's

  // to the token before: its dy, and the row of the oldest tap
  template <bool kSums>
  __device__ void step(const ConvDeviceInputs& in, const typename C::Row& dy,
                       const typename C::Row& oldest) {
    const int W = int(in.W);
    conv_shift(dz);
#pragma unroll
    for (int k = 0; k + 1 < C::kTaps; ++k) rows[k] = rows[k + 1];
    rows[C::kTaps - 1] = oldest;
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) {
      float x[C::kTaps], z = bias[i], d = dy[i];
#pragma unroll
      for (int k = C::kTaps - 1; k >= 0; --k) {
        x[k] = rows[k][i];
        if (k < W) z = __fmaf_rn(tap[k][i], x[k], z);
      }
      if (in.silu) d *= conv_slope(true, z);
      dz[0][i] = d;
      if constexpr (kSums) {
#pragma unroll
        for (int k = 0; k < C::kTaps; ++k) sums[k][i] = __fmaf_rn(d, x[k], sums[k][i]);
        sums[C::kTaps][i] += d;
      }
    }
  }
  __device__ void store_sums(const ConvDeviceBwd& p, const ConvPlace& at) const {
    const int64_t D = p.in.D, W = p.in.W;
    float* const to = p.partial + at.chunk * (W + 1) * D + at.c;
#pragma unroll
    for (int k = 0; k <= C::kTaps; ++k) {
      Pack<float, C::kVec> total;
#pragma unroll
      for (int i = 0; i < C::kVec; ++i) total.set(i, sums[k][i]);
      if (k < W || k == C::kTaps) total.store(to + (k == C::kTaps ? W : k) * D);
    }
  }
};

template <class C>
__global__ void __launch_bounds__(kConvThreads, 2)
    conv_bwd_kernel(const __grid_constant__ ConvDeviceBwd p,
                    const __grid_constant__ Offsets offsets, int64_t tokens) {
  using E = typename C::E;
  extern __shared__ float shared[];
  const ConvDeviceInputs& in = p.in;
  const ConvPlace at = conv_place<C>(in, tokens);
  const int W = int(in.W);
  ConvWalk<C> walk;
  conv_taps<C>(in, at.c, shared, walk.tap, walk.bias);
  if (at.c >= in.D) return;
  const E* const dy = static_cast<const E*>(p.dy.data) + at.b * p.dy.b + at.c;
  E* const dx = static_cast<E*>(p.dx) + at.b * in.T * in.D + at.c;
#pragma unroll
  for (int k = 0; k <= C::kTaps; ++k)
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) walk.sums[k][i] = 0;

  for (int64_t t = at.end - 1; t >= at.begin;) {
    const Span span = span_of(offsets, at.b, t);
    const int64_t begin = span.first > at.begin ? span.first : at.begin;
    if (span.n == in.N) {
      typename C::Row none;
      none.zero();
      for (; t >= begin; --t) none.store(dx + t * in.D);
      continue;
    }
    // dz of the tokens after the chunk that the taps reach; zero behind the sequence
    const int64_t reach = t + W < span.last ? t + W : span.last;
#pragma unroll
    for (int k = 0; k < C::kTaps; ++k) {
      walk.rows[k].zero();
      if (k > 0) conv_row<C>(in, span, at, reach - k, walk.rows[k]);
#pragma unroll
      for (int i = 0; i < C::kVec; ++i) walk.dz[k][i] = 0;
    }
    for (int64_t after = reach - 1; after > t; --after) {
      typename C::Row g, oldest;
      g.load(dy + after * p.dy.t);
      conv_row<C>(in, span, at, after - C::kTaps + 1, oldest);
      walk.template step<false>(in, g, oldest);
    }
    for (; t >= begin; t -= C::kBackStep) {
      typename C::Row g[C::kBackStep], oldest[C::kBackStep];
#pragma unroll
      for (int u = 0; u < C::kBackStep; ++u)
        if (t - u >= begin) {
          g[u].load(dy + (t - u) * p.dy.t);
          conv_row<C>(in, span, at, t - u - C::kTaps + 1, oldest[u]);
        }
#pragma unroll
      for (int u = 0; u < C::kBackStep; ++u) {
        if (t - u < begin) break;
        walk.template step<true>(in, g[u], oldest[u]);
        typename C::Row out;
#pragma unroll
        for (int i = 0; i < C::kVec; ++i)
          out.set(i, conv_sum(walk.tap, walk.dz, W, i,
                              conv_passed(p, span.n, at.c + i, t - u, span.last)));
        out.store(dx + (t - u) * in.D);
      }
    }
    t = begin - 1;
  }
  walk.store_sums(p, at);
}

// Gradient of the histories, a channel of a sequence a thread; dz is computed again.
template <class E>
__global__ void __launch_bounds__(kConvThreads, 4)
    conv_initial_kernel(const __grid_constant__ ConvDeviceBwd p,
                        const __grid_constant__ Offsets offsets) {
  const ConvDeviceInputs& in = p.in;
  const int64_t index = int64_t(blockIdx.x) * kConvThreads + threadIdx.x;
  if (index >= in.N * in.D) return;
  const int64_t n = index / in.D, c = index % in.D, b = offsets.data ? 0 : n, slots = in.W - 1;
  const Span span = sequence(offsets, n);
  const auto tap = [&](int64_t lag) { return load_any(in.weight, c * in.W + slots - lag); };
  const auto dz = [&](int64_t t) {
    float z = in.bias.data ? load_any(in.bias, c) : 0;
    for (int64_t k = slots; k >= 0; --k)
      z = __fmaf_rn(tap(k), to_float(conv_input<E>(in, span, b, t - k, c)), z);
    return to_float(static_cast<const E*>(p.dy.data)[offset(p.dy, b, t, 0) + c]) *
           conv_slope(in.silu, z);
  };
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t t = span.first - slots + slot;
    float d = conv_passed(p, n, c, t, span.last);
    for (int64_t k = slots; k >= 0; --k)
      if (t + k >= span.first && t + k < span.last) d = __fmaf_rn(tap(k), dz(t + k), d);
    store_any(d, p.d_initial, p.initial_type, index * slots + slot);
  }
}

struct ConvSums {  // columns [W + 1, D], taps by lag, to dweight [D, W] and dbias
  ConvDeviceBwd p;
  __device__ void operator()(int64_t column, float total) const {
    const int64_t D = p.in.D, W = p.in.W, k = column / D, c = column % D;
    if (k < W)
      store_any(total, p.dweight, p.in.weight.dtype, c * W + W - 1 - k);
    else if (p.dbias)
      store_any(total, p.dbias, p.in.bias.dtype, c);
  }
};

template <class E>
void conv_bwd_launch(const ConvDeviceBwd& p, const Offsets& offsets, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const ConvDeviceInputs& in = p.in;
  if (in.B * in.T * in.D != 0)
    conv_dispatch<E>(in, p.dx, &p.dy, [&](auto config) {
      using C = decltype(config);
      conv_bwd_kernel<C>
          <<<conv_grid<C>(in, true), kConvThreads, kConvTapFloats<C> * sizeof(float), stream>>>(
              p, offsets, in.chunk(true));
    });
  if (p.d_initial && in.N * in.D != 0)
    conv_initial_kernel<E>
        <<<unsigned((in.N * in.D + kConvThreads - 1) / kConvThreads), kConvThreads, 0, stream>>>(
            p, offsets);
}
}  // namespace df::cuda
