// The convolutions of mix.h for any d_v, K and alignment, and their states: a thread owns one
// feature, and rows are read again for every tap, from the caches. See mix_kernel.cuh.
#pragma once
#include "common/cuda/pack.cuh"
#include "common/cuda/sequences.cuh"
#include "ddl/mix.h"

namespace df::cuda {
constexpr int kMixThreads = 128;

// The slots of channel c of a state of sequence n.
template <class S>
__device__ inline S* mix_state(S* state, const MixShape& s, int64_t n, int64_t c) {
  return state + (n * s.in() + c) * (s.K - 1);
}

// Channel c of x at token t of row b, from the initial state where it is before the sequence.
template <class E>
__device__ inline float mix_input(const MixRows& x, const void* initial, const MixShape& s,
                                  const Span& span, int64_t b, int64_t t, int64_t c) {
  if (t >= span.first) return to_float(static_cast<const E*>(x.data)[b * x.b + t * x.t + c]);
  if (!initial) return 0;
  const int64_t slot = t - span.first + s.K - 1;
  return to_float(mix_state(static_cast<const E*>(initial), s, span.n, c)[slot]);
}
// Channel c of dy at token t of row b; zero outside the sequence.
template <class E>
__device__ inline float mix_gradient(const MixRows& dy, const Span& span, int64_t b, int64_t t,
                                     int64_t c) {
  if (t < span.first || t >= span.last) return 0;
  return to_float(static_cast<const E*>(dy.data)[b * dy.b + t * dy.t + c]);
}
__device__ inline float mix_tap(const MixShape& s, const void* w, int64_t k, int64_t c) {
  return static_cast<const float*>(w)[k * s.channels() + c];
}

struct MixPlace {  // tokens [begin, end) of row b, of a thread's features
  int64_t b, chunk, begin, end, feature;
};
// Of `threads` threads along the features, `width` of them each.
__device__ inline MixPlace mix_place(const MixShape& s, int64_t chunk, int64_t threads, int width) {
  const int64_t columns = (threads + kMixThreads - 1) / kMixThreads;
  const int64_t per_row = (s.T + chunk - 1) / chunk, i = blockIdx.x / columns;
  MixPlace at;
  at.b = i / per_row, at.chunk = i;
  at.begin = i % per_row * chunk;
  at.end = at.begin + chunk < s.T ? at.begin + chunk : s.T;
  at.feature = (blockIdx.x % columns * kMixThreads + threadIdx.x) * width;
  return at;
}

template <class E>
__global__ void __launch_bounds__(kMixThreads)
    mix_fwd_any_kernel(const __grid_constant__ MixFwdArgs p,
                       const __grid_constant__ Offsets offsets, int64_t chunk) {
  const MixShape& s = p.shape;
  const MixPlace at = mix_place(s, chunk, s.d, 1);
  if (at.feature >= s.d) return;
  for (int64_t t = at.begin; t < at.end; ++t) {
    const Span span = span_of(offsets, at.b, t);
    E* const y = static_cast<E*>(p.y) + (at.b * s.T + t) * s.out();
    float total = 0;
    for (int64_t j = 0; j < s.dv; ++j) {
      const int64_t wide = at.feature * s.dv + j, in = s.expand ? at.feature : wide;
      float sum = 0;
      for (int64_t k = 0; k < s.K && span.n < s.N; ++k) {
        const float x = mix_input<E>(p.x, p.initial, s, span, at.b, t - k, in);
        const float tap = mix_tap(s, p.w, k, wide);
        sum = k == 0 ? __fmul_rn(tap, x) : __fmaf_rn(tap, x, sum);
      }
      if (s.expand) from_float(sum, y + wide);
      total = j == 0 ? sum : __fadd_rn(total, sum);
    }
    if (!s.expand) from_float(total, y + at.feature);
  }
}

template <class E>
__global__ void __launch_bounds__(kMixThreads)
    mix_bwd_any_kernel(const __grid_constant__ MixBwdArgs p,
                       const __grid_constant__ Offsets offsets, float* partial, int64_t chunk) {
  const MixShape& s = p.shape;
  const MixPlace at = mix_place(s, chunk, s.d, 1);
  if (at.feature >= s.d) return;
  const auto put = [&](const Span& span, int64_t t, int64_t in, float d) {
    const int64_t slot = t - span.last + s.K - 1;
    if (p.d_final && slot >= 0 && span.n < s.N)
      d = __fadd_rn(d, mix_state(static_cast<const float*>(p.d_final), s, span.n, in)[slot]);
    from_float(d, static_cast<E*>(p.dx) + (at.b * s.T + t) * s.in() + in);
  };
  for (int64_t t = at.end - 1; t >= at.begin; --t) {
    const Span span = span_of(offsets, at.b, t);
    float total = 0;
    for (int64_t j = 0; j < s.dv; ++j) {
      const int64_t wide = at.feature * s.dv + j, out = s.expand ? wide : at.feature;
      float sum = 0;
      for (int64_t k = 0; k < s.K && span.n < s.N; ++k) {
        const float g = mix_gradient<E>(p.dy, span, at.b, t + k, out);
        const float tap = mix_tap(s, p.w, k, wide);
        sum = k == 0 ? __fmul_rn(tap, g) : __fmaf_rn(tap, g, sum);
      }
      if (!s.expand) put(span, t, wide, sum);
      total = j == 0 ? sum : __fadd_rn(total, sum);
    }
    if (s.expand) put(span, t, at.feature, total);
  }
  for (int64_t j = 0; j < s.dv; ++j) {
    const int64_t wide = at.feature * s.dv + j;
    const int64_t in = s.expand ? at.feature : wide, out = s.expand ? wide : at.feature;
    for (int64_t k = 0; k < s.K; ++k) {
      float sum = 0;
      for (int64_t t = at.end - 1; t >= at.begin; --t) {
        const Span span = span_of(offsets, at.b, t);
        if (span.n == s.N) continue;
        const float x = mix_input<E>(p.x, nullptr, s, span, at.b, t, in);
        sum = __fmaf_rn(mix_gradient<E>(p.dy, span, at.b, t + k, out), x, sum);
      }
      partial[(at.chunk * s.K + k) * s.channels() + wide] = sum;
    }
  }
}

// The last K - 1 inputs of every sequence, an element a thread.
template <class E>
__global__ void __launch_bounds__(kMixThreads)
    mix_final_kernel(const __grid_constant__ MixFwdArgs p,
                     const __grid_constant__ Offsets offsets) {
  const MixShape& s = p.shape;
  const int64_t i = int64_t(blockIdx.x) * kMixThreads + threadIdx.x, slots = s.K - 1;
  if (i >= s.N * s.in() * slots) return;
  const int64_t n = i / (s.in() * slots), c = i / slots % s.in();
  const Span span = sequence(offsets, n);
  const float x =
      mix_input<E>(p.x, p.initial, s, span, offsets.data ? 0 : n, span.last - slots + i % slots, c);
  from_float(x, static_cast<E*>(p.final) + i);
}

// Gradient of the initial states, and what they add to that of the taps; a feature a thread.
template <class E>
__global__ void __launch_bounds__(kMixThreads, 4)
    mix_initial_kernel(const __grid_constant__ MixBwdArgs p,
                       const __grid_constant__ Offsets offsets, float* partial) {
  const MixShape& s = p.shape;
  const int64_t i = int64_t(blockIdx.x) * kMixThreads + threadIdx.x, slots = s.K - 1;
  if (i >= s.N * s.d) return;
  const int64_t n = i / s.d, feature = i % s.d, b = offsets.data ? 0 : n;
  const Span span = sequence(offsets, n);
  const auto put = [&](int64_t slot, int64_t in, float d) {
    // the slot of the final state that is this position, if the sequence is that short
    const int64_t last = slot - (span.last - span.first);
    if (p.d_final && last >= 0)
      d = __fadd_rn(d, mix_state(static_cast<const float*>(p.d_final), s, n, in)[last]);
    mix_state(static_cast<float*>(p.d_initial), s, n, in)[slot] = d;
  };
  for (int64_t slot = 0; slot < slots; ++slot) {
    const int64_t t = span.first - slots + slot;
    float total = 0;
    for (int64_t j = 0; j < s.dv; ++j) {
      const int64_t wide = feature * s.dv + j, out = s.expand ? wide : feature;
      float sum = 0;
      for (int64_t k = slots - slot; k < s.K; ++k)
        sum = __fmaf_rn(mix_tap(s, p.w, k, wide), mix_gradient<E>(p.dy, span, b, t + k, out), sum);
      if (!s.expand) put(slot, wide, sum);
      total = __fadd_rn(total, sum);
    }
    if (s.expand) put(slot, feature, total);
  }
  for (int64_t j = 0; j < s.dv; ++j) {
    const int64_t wide = feature * s.dv + j;
    const int64_t in = s.expand ? feature : wide, out = s.expand ? wide : feature;
    for (int64_t k = 0; k < s.K; ++k) {
      float sum = 0;
      for (int64_t slot = slots - k; slot < slots; ++slot) {
        const int64_t t = span.first - slots + slot;
        const float x = mix_input<E>(p.x, p.initial, s, span, b, t, in);
        sum = __fmaf_rn(mix_gradient<E>(p.dy, span, b, t + k, out), x, sum);
      }
      partial[(n * s.K + k) * s.channels() + wide] = sum;
    }
  }
}
}  // namespace df::cuda
