// The gate of a value head on the device, and elements that are requested now and converted later.
#pragma once
#include "common/cuda/math.cuh"
#include "gated_delta/input.cuh"

namespace df::cuda {
// A conversion waits for its load: the bits alone do not. Not f64.
__device__ inline uint32_t load_bits(const Input& x, int64_t i) {
  return x.dtype == DType::f32 ? static_cast<const uint32_t*>(x.data)[i]
                               : uint32_t(static_cast<const uint16_t*>(x.data)[i]);
}
__device__ inline float to_float(uint32_t bits, DType type) {
  return type == DType::f32    ? __uint_as_float(bits)
         : type == DType::bf16 ? to_float(bf16{uint16_t(bits)})
                               : to_float(f16{uint16_t(bits)});
}

struct HeadGate {  // g = rate softplus(a + bias) if fused, else as given
  bool fused;
  float rate, bias;
};
__device__ inline HeadGate head_gate(const PreActivation& pre, int64_t head) {
  if (!pre.A_log.data) return {false, 0, 0};
  return {true, -expf(load_any(pre.A_log, head)),
          pre.dt_bias.data ? load_any(pre.dt_bias, head) : 0};
}
__device__ inline float gate(const HeadGate& h, float a) {  // not clamped
  return h.fused ? h.rate * softplus(a + h.bias) : a;
}
constexpr float kMinGate = -88;  // -inf means a reset
__device__ inline float clamp_gate(float g) {
  return g < kMinGate ? kMinGate : g;  // not fmaxf: NaN stays NaN
}
}  // namespace df::cuda
