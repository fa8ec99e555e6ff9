// Between the host and the CUDA kernels of the rotation. Knows neither torch nor CUDA.
#pragma once
#include "grape/rotary.h"

namespace df {
constexpr int64_t kRotaryMaxPlanes = 512;
constexpr int64_t kRotaryMaxParts =
    528;  // CTAs of a backward pass: fixed, as the order of its sums

struct RotaryLaunch {
  RotaryArgs args;
  bool vectors;    // all rows can be accessed by 16 bytes
  int32_t tokens;  // of a CTA; in a backward pass all that it takes one after the other
  int32_t heads;   // of angles that a CTA holds at once
  int32_t tile;    // heads of q and k whose products a backward pass holds at once
  RotaryGrads grads;
  double* parts;  // [CTAs, Hf, P, A]: partial sums of dfreqs
  int32_t part_count;
  void* dfreqs;  // [Hf, P, A]
};

void rotary_f32_cuda(const RotaryLaunch& x, bool grads, void* stream);
void rotary_bf16_cuda(const RotaryLaunch& x, bool grads, void* stream);
void rotary_f16_cuda(const RotaryLaunch& x, bool grads, void* stream);
void rotary_sum_cuda(const RotaryLaunch& x, void* stream);  // dfreqs from the partial sums

// Floats that one head of angles takes in shared memory for one token; in a backward pass with its
// sums, of which those of dfreqs are doubles.
inline int64_t rotary_head_floats(const RotaryArgs& p, bool backward, bool angles) {
  const int64_t tables = p.cos_k.data ? 2 : 1;
  const int64_t sums = !backward ? 0 : angles ? 1 + 2 * p.A : 2 * tables;
  return p.P * (2 * tables + sums);
}
inline int64_t rotary_tile_floats(const RotaryLaunch& x) {
  return x.tile * x.args.P * (x.grads.angles ? 1 : 2);
}
}  // namespace df
