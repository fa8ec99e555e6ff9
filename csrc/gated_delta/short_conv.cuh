// Causal short convolution over time, depthwise (short_conv.h), with lags k = W - 1 - i:
//   z_t = bias + sum_k w_k x_{t-k},  y = silu(z) or z
//   dz_t = dy_t silu'(z_t),  dx_t = sum_k w_k dz_{t+k},  dw_k = sum_t dz_t x_{t-k}
//
// CTA = (chunk of tokens, 128 threads along the channels). A thread owns 128 bits of channels (64
// bits of 16-bit channels if W > 4) and walks the chunk: forward in time for y, backward for the
// gradients, where z is computed again. The rows that the taps reach are in registers, so that HBM
// sees each element once. Forward, kStep rows are under way all the time: each is requested when
// the one kStep tokens before it is used. A chunk (up to 128 tokens forward, 256 backward) reads
// kTaps - 1 rows of its neighbour again, backward of x, and of dy after it, too.
// The taps, [D,W] of any type, and the bias come through shared memory, so that their accesses fill
// whole sectors: 4.1 (kTaps + 1) bytes a channel, at most 21 KB; a word is left out after each 32,
// which keeps stores, and at W = 2, 4, 8 reads, free of bank conflicts. Rows of single elements
// take the same way to the same bits. Registers: kTaps kVec of taps, of rows, backward of dz and
// sums as well; at most 128 forward for float channels (4 CTAs, 32 KB of rows under way an SM), 168
// else, and 255 backward. Bytes an element: 2 e forward, 3 e backward (e bytes an element), partial
// sums of the taps 4 (W + 1) a channel and chunk. FLOPs: 2 W + 15, backward 6 W + 25: bound by
// memory; forward 24 instructions an element, without branches.
#pragma once
#include "common/cuda/math.cuh"
#include "common/cuda/pack.cuh"
#include "common/cuda/sequences.cuh"
#include "gated_delta/input.cuh"
#include "gated_delta/input_bits.cuh"
#include "gated_delta/short_conv.h"
#include "gated_delta/silu.cuh"

namespace df::cuda {
constexpr int kConvThreads = 128;

template <class E_, bool kAligned, int kTaps_>
struct ConvConfig {
  using E = E_;
  static constexpr int kTaps = kTaps_, kStep = 4, kBackStep = kTaps > 4 ? 1 : 2;
  static constexpr int kVec = !kAligned ? 1 : kTaps > 4 ? 4 : 16 / int(sizeof(E));
  static constexpr int kCtas = kTaps * kVec <= 16 ? 4 : 3;  // an SM's registers hold
  using Row = Pack<E, kVec>;
  using Values = float[kVec];
};

// Channel c of x at token t of row b; from the history where it is before the sequence.
template <class E>
__device__ inline E conv_input(const ConvDeviceInputs& in, const Span& span, int64_t b, int64_t t,
                               int64_t c) {
  if (t >= span.first) return static_cast<const E*>(in.x.data)[offset(in.x, b, t, 0) + c];
  const int64_t slot = t - span.first + in.W - 1;
  if (!in.history.data || slot < 0) return E{};
  return static_cast<const E*>(in.history.data)[(span.n * in.D + c) * (in.W - 1) + slot];
}

struct ConvPlace {  // tokens [begin, end) of row b, and a thread's first channel
  int64_t b, chunk, begin, end, c;
};
template <class C>
__device__ inline ConvPlace conv_place(const ConvDeviceInputs& in, int64_t tokens) {
  const int64_t width = kConvThreads * C::kVec, columns = (in.D + width - 1) / width;
  const int64_t per_row = (in.T + tokens - 1) / tokens, i = blockIdx.x / columns;
  ConvPlace at;
  at.b = i / per_row, at.chunk = i;
  at.begin = i % per_row * tokens;
  at.end = at.begin + tokens < in.T ? at.begin + tokens : in.T;
  at.c = blockIdx.x % columns * width + threadIdx.x * C::kVec;
  return at;
}

// The taps of this thread's channels, by lag, and their bias; all threads of the CTA take part.
constexpr int conv_staged(int i) {
  return i + i / 32;  // a thread's elements do not start in the banks of its neighbours'
}
template <class C>
constexpr int kConvTapFloats = conv_staged(kConvThreads * C::kVec * (C::kTaps + 1));
template <class C>
__device__ inline void conv_taps(const ConvDeviceInputs& in, int64_t c, float* shared,
                                 float (&tap)[C::kTaps][C::kVec], float (&bias)[C::kVec]) {
  constexpr int kBiases = kConvThreads * C::kVec * C::kTaps;  // behind the taps
  const int W = int(in.W), mine = C::kVec * W;
  const int64_t first = c - threadIdx.x * C::kVec, inside = in.D - first;
  const int64_t end = (inside < kConvThreads * C::kVec ? inside : kConvThreads * C::kVec) * W;
  uint32_t taps_of_all[C::kVec * C::kTaps], bias_of_all[C::kVec];
  input_bits<kConvThreads>(in.weight, first * W + threadIdx.x, end - threadIdx.x, taps_of_all);
  input_bits<kConvThreads>(in.bias, first + threadIdx.x,
                           in.bias.data ? inside - int64_t(threadIdx.x) : 0, bias_of_all);
#pragma unroll
  for (int n = 0; n < C::kVec * C::kTaps; ++n)
    shared[conv_staged(n * kConvThreads + threadIdx.x)] =
        from_input_bits(taps_of_all[n], in.weight.dtype);
#pragma unroll
  for (int n = 0; n < C::kVec; ++n)
    shared[conv_staged(kBiases + n * kConvThreads + threadIdx.x)] =
        from_input_bits(bias_of_all[n], in.bias.dtype);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) {
    bias[i] = shared[conv_staged(kBiases + threadIdx.x * C::kVec + i)];
#pragma unroll
    for (int k = 0; k < C::kTaps; ++k)
      tap[k][i] = k < W ? shared[conv_staged(threadIdx.x * mine + i * W + W - 1 - k)] : 0;
  }
}

// The row of x at token t, from memory or element by element from the history.
template <class C>
__device__ inline void conv_row(const ConvDeviceInputs& in, const Span& span, const ConvPlace& at,
                                int64_t t, typename C::Row& row) {
  using E = typename C::E;
  if (t >= span.first) {
    row.load(static_cast<const E*>(in.x.data) + offset(in.x, at.b, t, 0) + at.c);
  } else {
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) row.elements[i] = conv_input<E>(in, span, at.b, t, at.c + i);
  }
}
template <class C>
__device__ inline void conv_widen(const typename C::Row& row, float (&x)[C::kVec]) {
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) x[i] = row[i];
}

// rows[k] <- rows[k - 1]
template <int kTaps, int kVec>
__device__ inline void conv_shift(float (&rows)[kTaps][kVec]) {
#pragma unroll
  for (int k = kTaps - 1; k > 0; --k)
#pragma unroll
    for (int i = 0; i < kVec; ++i) rows[k][i] = rows[k - 1][i];
}
// start + sum_k w_k rows_k, the oldest first.
template <int kTaps, int kVec>
__device__ inline float conv_sum(const float (&tap)[kTaps][kVec], const float (&rows)[kTaps][kVec],
                                 int W, int i, float start) {
#pragma unroll
  for (int k = kTaps - 1; k >= 0; --k)
    if (k < W) start = __fmaf_rn(tap[k][i], rows[k][i], start);
  return start;
}

__device__ inline float conv_activation(bool with_silu, float z) {
  const float y = silu(z);
  return with_silu ? y : z;
}

template <class C>
__global__ void __launch_bounds__(kConvThreads, C::kCtas)
    conv_fwd_kernel(const __grid_constant__ ConvDeviceFwd p,
                    const __grid_constant__ Offsets offsets, int64_t tokens) {
  using E = typename C::E;
  extern __shared__ float shared[];
  const ConvDeviceInputs& in = p.in;
  const ConvPlace at = conv_place<C>(in, tokens);
  const int W = int(in.W);
  float tap[C::kTaps][C::kVec], rows[C::kTaps][C::kVec], bias[C::kVec];  // rows[k]: token t - k
  conv_taps<C>(in, at.c, shared, tap, bias);
  if (at.c >= in.D) return;

  for (int64_t t = at.begin, end; t < at.end; t = end) {
    const Span span = span_of(offsets, at.b, t);
    end = span.last < at.end ? span.last : at.end;
    const E* x = static_cast<const E*>(in.x.data) + offset(in.x, at.b, t, 0) + at.c;
    E* y = static_cast<E*>(p.y) + (at.b * in.T + t) * in.D + at.c;
    typename C::Row past[C::kTaps - 1], next[C::kStep];
    if (span.n == in.N) {  // behind the last sequence
      next[0].zero();
#pragma unroll 1
      for (; t < end; ++t, y += in.D) next[0].store(y);
      continue;
    }
#pragma unroll
    for (int k = 1; k < C::kTaps; ++k) {
      past[k - 1].zero();
      if (k < W) conv_row<C>(in, span, at, t - k, past[k - 1]);
    }
#pragma unroll
    for (int u = 0; u < C::kStep; ++u) {
      next[u].zero();
      if (t + u < end) next[u].load(x + u * in.x.t);
    }
#pragma unroll
    for (int k = 1; k < C::kTaps; ++k) conv_widen<C>(past[k - 1], rows[k - 1]);
    for (int left = int(end - t); left > 0; left -= C::kStep) {
#pragma unroll
      for (int u = 0; u < C::kStep; ++u) {
        conv_shift(rows);
        conv_widen<C>(next[u], rows[0]);
        if (u + C::kStep < left) next[u].load(x + (u + C::kStep) * in.x.t);
        typename C::Row out;
#pragma unroll
        for (int i = 0; i < C::kVec; ++i)
          out.set(i, conv_activation(in.silu, conv_sum(tap, rows, W, i, bias[i])));
        if (u < left) out.store(y + u * in.D);
      }
      x += C::kStep * in.x.t, y += C::kStep * in.D;
    }
  }
}

// The last W - 1 inputs of every sequence, an element a thread.
template <class E>
__global__ void __launch_bounds__(kConvThreads)
    conv_final_kernel(const __grid_constant__ ConvDeviceFwd p,
                      const __grid_constant__ Offsets offsets) {
  const ConvDeviceInputs& in = p.in;
  const int64_t i = int64_t(blockIdx.x) * kConvThreads + threadIdx.x, slots = in.W - 1;
  if (i >= in.N * in.D * slots) return;
  const int64_t n = i / (in.D * slots);
  const Span span = sequence(offsets, n);
  static_cast<E*>(p.final_state)[i] = conv_input<E>(
      in, span, offsets.data ? 0 : n, span.last - slots + i % slots, i / slots % in.D);
}

// fn(ConvConfig) with the widest accesses that all tensors allow.
template <class E, class Fn>
void conv_dispatch(const ConvDeviceInputs& in, const void* y, const Input* dy, Fn fn) {
  const auto whole = [&](const Input& x) {
    constexpr int64_t kCount = 16 / sizeof(E);
    return x.b % kCount == 0 && x.t % kCount == 0 && on_boundary(x.data, 16);
  };
  const bool aligned =
      in.D % (16 / sizeof(E)) == 0 && on_boundary(y, 16) && whole(in.x) && (!dy || whole(*dy));
  if (in.W <= 4)
    aligned ? fn(ConvConfig<E, true, 4>{}) : fn(ConvConfig<E, false, 4>{});
  else
    aligned ? fn(ConvConfig<E, true, 8>{}) : fn(ConvConfig<E, false, 8>{});
}
template <class C>
unsigned conv_grid(const ConvDeviceInputs& in, bool backward) {
  const int64_t width = kConvThreads * C::kVec;
  return unsigned((in.D + width - 1) / width * in.chunks(backward));
}

template <class E>
void conv_fwd_launch(const ConvDeviceFwd& p, const Offsets& offsets, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const ConvDeviceInputs& in = p.in;
  if (in.B * in.T * in.D != 0)
    conv_dispatch<E>(in, p.y, nullptr, [&](auto config) {
      using C = decltype(config);
      conv_fwd_kernel<C>
          <<<conv_grid<C>(in, false), kConvThreads, kConvTapFloats<C> * sizeof(float), stream>>>(
              p, offsets, in.chunk(false));
    });
  const int64_t states = in.N * in.D * (in.W - 1);
  if (p.final_state && states != 0)
    conv_final_kernel<E>
        <<<unsigned((states + kConvThreads - 1) / kConvThreads), kConvThreads, 0, stream>>>(
            p, offsets);
}
}  // namespace df::cuda
