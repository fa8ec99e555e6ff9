// The next few tokens of the short convolution, y_t = act(bias + sum_k w_k x_{t-k}), with the last
// W - 1 inputs replaced in place: state [B,D,W-1] with any strides.
//
// CTA = (row, 128 channels), a channel a thread. The state goes through shared memory in both
// directions, so that a contiguous one is moved in whole sectors; the CTA has read its part before
// it writes it. Shared memory: 128 ((W-1) | 1) floats of state, odd lengths a channel to keep reads
// free of bank conflicts, and the taps as short_conv.cuh stages them: at most 8.4 KB. Registers: at
// most 64.
// Bytes a channel: (2 W - 2 + 2 T) e, and 4 W of float taps. FLOPs: (2 W + 10) T.
// For a few rows bound by latency, for many by memory: the state is three times what x is at W = 4
// and T = 1.
#include "gated_delta/short_conv.cuh"

namespace df::cuda {
namespace {
// fn(element of shared memory, element of the state) of this CTA's channels, across all threads.
template <class Fn>
__device__ inline void conv_each_slot(const ConvDeviceUpdate& p, int64_t b, int64_t first, Fn fn) {
  const int slots = int(p.in.W) - 1, stride = slots | 1;
  for (int i = threadIdx.x; i < kConvThreads * slots; i += kConvThreads) {
    const int channel = i / slots, slot = i % slots;
    if (first + channel < p.in.D)
      fn(channel * stride + slot, b * p.state_b + (first + channel) * p.state_d + slot * p.state_w);
  }
}

template <class E>
__global__ void __launch_bounds__(kConvThreads, 8)
    conv_update_kernel(const __grid_constant__ ConvDeviceUpdate p) {
  using C = ConvConfig<E, false, 8>;
  extern __shared__ float shared[];
  const ConvDeviceInputs& in = p.in;
  const int W = int(in.W), slots = W - 1, stride = slots | 1;
  const int64_t columns = (in.D + kConvThreads - 1) / kConvThreads;
  const int64_t b = blockIdx.x / columns, first = blockIdx.x % columns * kConvThreads;
  const int64_t c = first + threadIdx.x;
  float* const slots_of_all = shared + kConvTapFloats<C>;
  float* const mine = slots_of_all + threadIdx.x * stride;
  E* const state = static_cast<E*>(p.state);

  conv_each_slot(p, b, first,
                 [&](int to, int64_t from) { slots_of_all[to] = to_float(state[from]); });
  float tap[C::kTaps][1], bias[1], rows[C::kTaps][1];  // rows[k]: the input k tokens ago
  conv_taps<C>(in, c, shared, tap, bias);              // waits for all threads
#pragma unroll
  for (int k = 0; k < C::kTaps; ++k) rows[k][0] = k < slots && c < in.D ? mine[slots - 1 - k] : 0;
  for (int64_t t = 0; t < in.T && c < in.D; ++t) {
    conv_shift(rows);
    rows[0][0] = to_float(static_cast<const E*>(in.x.data)[offset(in.x, b, t, 0) + c]);
    from_float(conv_activation(in.silu, conv_sum(tap, rows, W, 0, bias[0])),
               static_cast<E*>(p.y) + (b * in.T + t) * in.D + c);
  }
#pragma unroll
  for (int k = 0; k < C::kTaps; ++k)
    if (k < slots) mine[slots - 1 - k] = rows[k][0];
  __syncthreads();
  conv_each_slot(p, b, first,
                 [&](int from, int64_t to) { from_float(slots_of_all[from], state + to); });
}

template <class E>
void conv_update_launch(const ConvDeviceUpdate& p, void* stream) {
  const int64_t columns = (p.in.D + kConvThreads - 1) / kConvThreads;
  if (p.in.B * columns == 0) return;
  const size_t floats = kConvTapFloats<ConvConfig<E, false, 8>> + kConvThreads * ((p.in.W - 1) | 1);
  conv_update_kernel<E><<<unsigned(p.in.B * columns), kConvThreads, floats * sizeof(float),
                          static_cast<cudaStream_t>(stream)>>>(p);
}
}  // namespace
}  // namespace df::cuda

void df::conv_update_cuda(const ConvDeviceUpdate& args, void* stream) {
  switch (args.in.x.dtype) {
    case DType::f32: return cuda::conv_update_launch<float>(args, stream);
    case DType::bf16: return cuda::conv_update_launch<bf16>(args, stream);
    default: return cuda::conv_update_launch<f16>(args, stream);
  }
}
