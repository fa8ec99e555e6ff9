// The two convolutions over time of mix.h, for d_v in 1, 2, 4, 8, K <= 4 and aligned rows:
//   read-out    y_{t,i}  = sum_j (sum_s w_{s,ij} x_{t-s,ij})
//   expansion   y_{t,ij} = sum_s w_{s,ij} x_{t-s,i}
// and, at input position t with g = dy (zero outside the sequence):
//   dx_t = sum_s w_s g_{t+s} (summed over j for an expansion),   dw_s += g_{t+s} x_t
//
// CTA = (chunk of tokens, 128 threads along the features). A thread owns the kWide = kFeatures d_v
// channels of 128 bits of the wide tensor (two such words for float and d_v = 8) and walks the
// chunk: forward in time for y, backward for dx, with the K - 1 rows before it (after it) in
// registers, so that HBM sees each element once; kStep (kBackStep) tokens are requested at once. No
// thread needs another one: no shared memory, and no idle lanes but at the end of the features.
// Registers: taps and their sums K kWide floats each, K rows, the requests: at most 168 forward and
// 208 backward (d_v = 1 in 16 bits; else 184).
// Bytes a token and feature: e (d_v + 1) forward, e (2 d_v + 1) or e (d_v + 2) backward, with e
// bytes an element. A chunk adds its taps and K - 1 rows from L2 (7 % of the accesses for 128
// tokens of bfloat16, d_v = 4), backward also partial sums to HBM (3 % for 256 tokens). FLOPs:
// 2 K d_v, backward 4 K d_v: 1 to 4 a byte, so HBM bounds it.
//
// A product-sum is rounded in the same places in every variant (mix_any.cuh is the other one), so
// that results do not depend on alignment, chunks or what else is in the batch.
#pragma once
#include "common/cuda/pack.cuh"
#include "common/cuda/sequences.cuh"
#include "ddl/mix.h"
#include "ddl/mix_any.cuh"

namespace df::cuda {
template <class E_, int kDv_, bool kExpand_>
struct MixConfig {
  using E = E_;
  static constexpr int kDv = kDv_;
  static constexpr bool kExpand = kExpand_;
  static constexpr int kVec = 16 / sizeof(E), kTaps = 4, kStep = 4, kBackStep = 2;
  static constexpr int kFeatures = kDv >= kVec ? 1 : kVec / kDv;
  static constexpr int kWide = kFeatures * kDv;
  static constexpr int kIn = kExpand ? kFeatures : kWide, kOut = kExpand ? kWide : kFeatures;
};

// Taps of kCount neighbouring channels; those beyond K are not touched.
template <int kTaps, int kCount>
__device__ inline void mix_taps(const MixShape& s, const void* w, int64_t c,
                                float (&tap)[kTaps][kCount]) {
#pragma unroll
  for (int k = 0; k < kTaps; ++k) {
    Pack<float, kCount> row;
    row.zero();
    if (k < s.K) row.load(static_cast<const float*>(w) + k * s.channels() + c);
#pragma unroll
    for (int i = 0; i < kCount; ++i) tap[k][i] = row[i];
  }
}

template <class C>
__global__ void __launch_bounds__(kMixThreads)
    mix_fwd_kernel(const __grid_constant__ MixFwdArgs p, const __grid_constant__ Offsets offsets,
                   int64_t chunk) {
  using E = typename C::E;
  const MixShape& s = p.shape;
  const MixPlace at = mix_place(s, chunk, s.d / C::kFeatures, C::kFeatures);
  if (at.feature >= s.d) return;
  const int64_t wide = at.feature * C::kDv, in = C::kExpand ? at.feature : wide;
  const E* const x = static_cast<const E*>(p.x.data) + at.b * p.x.b + in;
  E* const y = static_cast<E*>(p.y) + at.b * s.T * s.out() + (C::kExpand ? wide : at.feature);
  float tap[C::kTaps][C::kWide], row[C::kTaps][C::kIn];  // row[k]: of token t - k
  mix_taps(s, p.w, wide, tap);

  for (int64_t t = at.begin; t < at.end;) {
    const Span span = span_of(offsets, at.b, t);
    const int64_t end = span.last < at.end ? span.last : at.end;
    if (span.n == s.N) {  // behind the last sequence
      Pack<E, C::kOut> out;
      out.zero();
      for (; t < end; ++t) out.store(y + t * s.out());
      continue;
    }
#pragma unroll
    for (int k = 1; k < C::kTaps; ++k) {
      const bool inside = k < s.K && t - k >= span.first;
      Pack<E, C::kIn> earlier;
      earlier.zero();
      if (inside) earlier.load(x + (t - k) * p.x.t);
#pragma unroll
      for (int i = 0; i < C::kIn; ++i)
        row[k - 1][i] = inside || k >= s.K
                            ? earlier[i]
                            : mix_input<E>(p.x, p.initial, s, span, at.b, t - k, in + i);
    }

    for (; t < end; t += C::kStep) {
      Pack<E, C::kIn> next[C::kStep];
#pragma unroll
      for (int u = 0; u < C::kStep; ++u)
        if (t + u < end) next[u].load(x + (t + u) * p.x.t);
#pragma unroll
      for (int u = 0; u < C::kStep; ++u) {
        if (t + u >= end) break;
#pragma unroll
        for (int k = C::kTaps - 1; k > 0; --k)
#pragma unroll
          for (int i = 0; i < C::kIn; ++i) row[k][i] = row[k - 1][i];
#pragma unroll
        for (int i = 0; i < C::kIn; ++i) row[0][i] = next[u][i];
        Pack<E, C::kOut> out;
        float total = 0;
#pragma unroll
        for (int i = 0; i < C::kWide; ++i) {
          const int from = C::kExpand ? i / C::kDv : i;
          float sum = __fmul_rn(tap[0][i], row[0][from]);
#pragma unroll
          for (int k = 1; k < C::kTaps; ++k)
            if (k < s.K) sum = __fmaf_rn(tap[k][i], row[k][from], sum);
          if constexpr (C::kExpand) {
            out.set(i, sum);
          } else {
            total = i % C::kDv == 0 ? sum : __fadd_rn(total, sum);
            if (i % C::kDv == C::kDv - 1) out.set(i / C::kDv, total);
          }
        }
        out.store(y + (t + u) * s.out());
      }
    }
    t = end;
  }
}

template <class C>
__global__ void __launch_bounds__(kMixThreads)
    mix_bwd_kernel(const __grid_constant__ MixBwdArgs p, const __grid_constant__ Offsets offsets,
                   float* partial, int64_t chunk) {
  using E = typename C::E;
  const MixShape& s = p.shape;
  const MixPlace at = mix_place(s, chunk, s.d / C::kFeatures, C::kFeatures);
  if (at.feature >= s.d) return;
  const int64_t wide = at.feature * C::kDv, in = C::kExpand ? at.feature : wide;
  const int64_t out = C::kExpand ? wide : at.feature;
  const E* const x = static_cast<const E*>(p.x.data) + at.b * p.x.b + in;
  const E* const dy = static_cast<const E*>(p.dy.data) + at.b * p.dy.b + out;
  E* const dx = static_cast<E*>(p.dx) + at.b * s.T * s.in() + in;
  float tap[C::kTaps][C::kWide], sums[C::kTaps][C::kWide] = {};
  float row[C::kTaps][C::kOut];  // row[k]: of dy at token t + k
  mix_taps(s, p.w, wide, tap);

  for (int64_t t = at.end - 1; t >= at.begin;) {
    const Span span = span_of(offsets, at.b, t);
    const int64_t begin = span.first > at.begin ? span.first : at.begin;
    if (span.n == s.N) {
      Pack<E, C::kIn> none;
      none.zero();
      for (; t >= begin; --t) none.store(dx + t * s.in());
      continue;
    }
#pragma unroll
    for (int k = 1; k < C::kTaps; ++k) {
      Pack<E, C::kOut> later;
      later.zero();
      if (k < s.K && t + k < span.last) later.load(dy + (t + k) * p.dy.t);
#pragma unroll
      for (int i = 0; i < C::kOut; ++i) row[k - 1][i] = later[i];
    }

    for (; t >= begin; t -= C::kBackStep) {
      Pack<E, C::kOut> g[C::kBackStep];
      Pack<E, C::kIn> inputs[C::kBackStep];
#pragma unroll
      for (int u = 0; u < C::kBackStep; ++u)
        if (t - u >= begin) {
          g[u].load(dy + (t - u) * p.dy.t);
          inputs[u].load(x + (t - u) * p.x.t);
        }
#pragma unroll
      for (int u = 0; u < C::kBackStep; ++u) {
        if (t - u < begin) break;
#pragma unroll
        for (int k = C::kTaps - 1; k > 0; --k)
#pragma unroll
          for (int i = 0; i < C::kOut; ++i) row[k][i] = row[k - 1][i];
#pragma unroll
        for (int i = 0; i < C::kOut; ++i) row[0][i] = g[u][i];
        float d[C::kIn];
#pragma unroll
        for (int i = 0; i < C::kWide; ++i) {
          const int feature = i / C::kDv, from = C::kExpand ? i : feature;
          const float value = inputs[u][C::kExpand ? feature : i];
          float sum = __fmul_rn(tap[0][i], row[0][from]);
          sums[0][i] = __fmaf_rn(row[0][from], value, sums[0][i]);
#pragma unroll
          for (int k = 1; k < C::kTaps; ++k)
            if (k < s.K) {
              sum = __fmaf_rn(tap[k][i], row[k][from], sum);
              sums[k][i] = __fmaf_rn(row[k][from], value, sums[k][i]);
            }
          if constexpr (C::kExpand)
            d[feature] = i % C::kDv == 0 ? sum : __fadd_rn(d[feature], sum);
          else
            d[i] = sum;
        }
        const int64_t slot = t - u - span.last + s.K - 1;
        Pack<E, C::kIn> result;
#pragma unroll
        for (int i = 0; i < C::kIn; ++i) {
          if (p.d_final && slot >= 0)
            d[i] = __fadd_rn(
                d[i], mix_state(static_cast<const float*>(p.d_final), s, span.n, in + i)[slot]);
          result.set(i, d[i]);
        }
        result.store(dx + (t - u) * s.in());
      }
    }
    t = begin - 1;
  }
#pragma unroll
  for (int k = 0; k < C::kTaps; ++k) {
    Pack<float, C::kWide> total;
#pragma unroll
    for (int i = 0; i < C::kWide; ++i) total.set(i, sums[k][i]);
    if (k < s.K) total.store(partial + (at.chunk * s.K + k) * s.channels() + wide);
  }
}

template <int kFeatures, class E>
bool mix_aligned(const MixShape& s, const MixRows& rows, bool is_wide) {
  const int64_t count = is_wide ? kFeatures * s.dv : kFeatures, whole = 16 / sizeof(E);
  const int64_t word = count < whole ? count : whole;
  return s.d % kFeatures == 0 && rows.b % word == 0 && rows.t % word == 0 &&
         on_boundary(rows.data, word * sizeof(E));
}

// fn(MixConfig) for what has a fast variant; whether there was one.
template <class E, class Fn>
bool mix_dispatch(const MixShape& s, const MixRows& x, const void* y, const MixRows* dy,
                  const void* w, const float* partial, Fn fn) {
  const auto attempt = [&](auto narrow, auto wide) {
    using C = decltype(narrow);
    const MixRows out{y, s.T * s.out(), s.out()};
    const MixRows in{y, s.T * s.in(), s.in()};
    if (!(on_boundary(w, 16) && on_boundary(partial, 16) &&
          mix_aligned<C::kFeatures, E>(s, x, !s.expand) &&
          (dy ? mix_aligned<C::kFeatures, E>(s, *dy, s.expand) &&
                    mix_aligned<C::kFeatures, E>(s, in, !s.expand)
              : mix_aligned<C::kFeatures, E>(s, out, s.expand))))
      return false;
    s.expand ? fn(wide) : fn(narrow);
    return true;
  };
  if (s.K > 4) return false;
  switch (s.dv) {
    case 1: return attempt(MixConfig<E, 1, false>{}, MixConfig<E, 1, true>{});
    case 2: return attempt(MixConfig<E, 2, false>{}, MixConfig<E, 2, true>{});
    case 4: return attempt(MixConfig<E, 4, false>{}, MixConfig<E, 4, true>{});
    case 8: return attempt(MixConfig<E, 8, false>{}, MixConfig<E, 8, true>{});
  }
  return false;
}

inline unsigned mix_grid(const MixShape& s, int64_t threads, bool backward) {
  return unsigned((threads + kMixThreads - 1) / kMixThreads * mix_chunks(s, backward));
}

template <class E>
void mix_fwd_launch(const MixFwdArgs& p, const Offsets& offsets, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const MixShape& s = p.shape;
  const int64_t chunk = mix_chunk(s, false);
  if (s.B * s.T * s.d != 0 &&
      !mix_dispatch<E>(s, p.x, p.y, nullptr, p.w, nullptr, [&](auto config) {
        using C = decltype(config);
        const unsigned grid = mix_grid(s, s.d / C::kFeatures, false);
        mix_fwd_kernel<C><<<grid, kMixThreads, 0, stream>>>(p, offsets, chunk);
      }))
    mix_fwd_any_kernel<E><<<mix_grid(s, s.d, false), kMixThreads, 0, stream>>>(p, offsets, chunk);
  const int64_t states = s.N * s.in() * (s.K - 1);
  if (p.final && states != 0)
    mix_final_kernel<E>
        <<<(states + kMixThreads - 1) / kMixThreads, kMixThreads, 0, stream>>>(p, offsets);
}

template <class E>
void mix_bwd_launch(const MixBwdArgs& p, const MixSums& sums, const Offsets& offsets,
                    void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const MixShape& s = p.shape;
  const int64_t chunk = mix_chunk(s, true);
  if (s.B * s.T * s.d != 0 &&
      !mix_dispatch<E>(s, p.x, p.dx, &p.dy, p.w, sums.partial, [&](auto config) {
        using C = decltype(config);
        const unsigned grid = mix_grid(s, s.d / C::kFeatures, true);
        mix_bwd_kernel<C><<<grid, kMixThreads, 0, stream>>>(p, offsets, sums.partial, chunk);
      }))
    mix_bwd_any_kernel<E>
        <<<mix_grid(s, s.d, true), kMixThreads, 0, stream>>>(p, offsets, sums.partial, chunk);
  if (p.initial && s.N * s.d * (s.K - 1) != 0)
    mix_initial_kernel<E><<<(s.N * s.d + kMixThreads - 1) / kMixThreads, kMixThreads, 0, stream>>>(
        p, offsets, sums.partial + mix_chunks(s, true) * s.K * s.channels());
}
}  // namespace df::cuda
