// 8-bit state, in blocks of kMarsQuantum elements divided by the largest magnitude of the block
// (8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861). A code k stands for
//   0 if k = 0, else 10^(e + 1 - E) (0.1 + 0.9 (k + 1 - 2^e) / 2^e),  e = floor(log2 k):
// E decades, the upper ones with more levels, each decade's last level the next one's zeroth.
// Signed arrays have E = 7 and the sign in bit 7; second moments, which are never negative, E = 8.
// These are never rounded to 0, which would divide the update by eps alone.
#pragma once
#include "mars/mars_scalars.h"

namespace df {
template <bool is_signed>
DF_HOST_DEVICE constexpr float mars_decode(uint32_t code) {
  const uint32_t k = is_signed ? code & 127 : code;
  float unit = is_signed ? 1e-6f : 1e-7f, levels = 1;
  for (uint32_t top = 2; top <= k; top *= 2) unit *= 10, levels *= 2;
  const float x = k ? unit * (0.1f + 0.9f * (float(k) + 1 - levels) / levels) : 0;
  return is_signed && code > 127 ? -x : x;
}

// x = value / absmax, in [-1, 1].
template <bool is_signed>
DF_HOST_DEVICE constexpr uint32_t mars_encode(float x) {
  constexpr int kDecades = is_signed ? 7 : 8;
  const float magnitude = x < 0 ? -x : x;
  float scaled = magnitude * (is_signed ? 1e6f : 1e7f), levels = 1;
  for (int e = 1; e < kDecades; ++e) {  // into (0.1, 1], without a branch
    const bool larger = scaled > 1;
    scaled = larger ? scaled * 0.1f : scaled;
    levels = larger ? levels * 2 : levels;
  }
  float place = (scaled - 0.1f) * (levels / 0.9f) + 0.5f;
  place = place >= 0 ? (place > levels ? levels : place) : 0;  // 0 for NaN, which absmax keeps
  uint32_t k = uint32_t(levels) - 1 + uint32_t(place);
  if (!is_signed && k == 0 && x > 0) k = 1;
  return is_signed && x < 0 ? k | 128 : k;
}
}  // namespace df
