// Reading the tensors of input.h on the device.
#pragma once
#include "common/cuda/load.cuh"
#include "common/cuda/math.cuh"
#include "gated_delta/input.h"

namespace df::cuda {
__device__ inline int64_t offset(const Input& x, int64_t b, int64_t t, int64_t h) {
  return b * x.b + t * x.t + h * x.h;
}
template <class Source>  // Input or Dense
__device__ inline float load_any(const Source& x, int64_t i) {
  return load_any(x.data, x.dtype, i);
}

// An element that is requested now and converted later: a conversion waits for its load. Not f64.
__device__ inline uint32_t load_bits(const Input& x, int64_t i) {
  return x.dtype == DType::f32 ? static_cast<const uint32_t*>(x.data)[i]
                               : uint32_t(static_cast<const uint16_t*>(x.data)[i]);
}
__device__ inline float to_float(uint32_t bits, DType type) {
  return type == DType::f32    ? __uint_as_float(bits)
         : type == DType::bf16 ? to_float(bf16{uint16_t(bits)})
                               : to_float(f16{uint16_t(bits)});
}

// g of one value head: as given, or -exp(A_log) softplus(a + dt_bias).
struct HeadGate {
  bool given;
  float rate, dt_bias;
};
__device__ inline HeadGate head_gate(const PreActivation& pre, int64_t h) {
  if (!pre.A_log.data) return {true, 0, 0};
  return {false, -expf(load_any(pre.A_log, h)), pre.dt_bias.data ? load_any(pre.dt_bias, h) : 0};
}
__device__ inline float gate(const HeadGate& h, float a) {  // not clamped
  return h.given ? a : h.rate * softplus(a + h.dt_bias);
}
__device__ inline float clamp_gate(float g) {
  return g < -88 ? -88 : g;  // not fmaxf: NaN stays NaN
}
}  // namespace df::cuda
