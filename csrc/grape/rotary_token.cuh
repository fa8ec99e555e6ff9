// A CTA's tokens and their angles: cos and sin in shared memory, from frequencies or from tables.
#pragma once
#include "common/cuda/load.cuh"
#include "grape/rotary_launch.h"
#include "grape/rotary_turns.h"

namespace df::cuda {
struct RotaryToken {
  int64_t b, t, position;
};

__device__ inline int64_t index_at(const void* p, bool is64, int64_t i) {
  return is64 ? static_cast<const int64_t*>(p)[i] : int64_t(static_cast<const int32_t*>(p)[i]);
}

__device__ inline RotaryToken rotary_token(const RotaryArgs& p, int64_t n) {
  const RotaryPositions& x = p.positions;
  RotaryToken at{n / p.T, n % p.T, n % p.T};
  int64_t sequence = at.b;
  if (x.cu_seqlens) {
    int64_t low = 0, high = x.N - 1;  // the last sequence that begins at or before t
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (index_at(x.cu_seqlens, x.cu64, middle) <= at.t)
        low = middle;
      else
        high = middle - 1;
    }
    sequence = low;
    at.position -= x.N > 0 ? index_at(x.cu_seqlens, x.cu64, low) : 0;
  }
  at.position += x.offset;
  if (x.offsets) at.position += index_at(x.offsets, x.offsets64, sequence);
  return at;
}

__device__ inline bool is_real(const RotaryArgs& p) {
  return p.positions.type == PositionType::f32 || p.positions.type == PositionType::f64;
}
__device__ inline int64_t whole_position(const RotaryArgs& p, const RotaryToken& at, int64_t hp,
                                         int64_t a) {
  const RotaryPositions& x = p.positions;
  if (x.type == PositionType::none) return at.position;
  const int64_t i = at.b * x.b + at.t * x.t + hp * x.h + a * x.a;
  return index_at(x.data, x.type == PositionType::i64, i);
}
__device__ inline double real_position(const RotaryArgs& p, const RotaryToken& at, int64_t hp,
                                       int64_t a) {
  const RotaryPositions& x = p.positions;
  if (!is_real(p)) return double(whole_position(p, at, hp, a));
  const int64_t i = at.b * x.b + at.t * x.t + hp * x.h + a * x.a;
  return x.type == PositionType::f64 ? static_cast<const double*>(x.data)[i]
                                     : double(static_cast<const float*>(x.data)[i]);
}
__device__ inline double rotary_frequency(const RotaryArgs& p, int64_t i) {
  return p.freqs64 ? static_cast<const double*>(p.freqs)[i]
                   : double(static_cast<const float*>(p.freqs)[i]);
}

struct CosSin {
  float cos, sin;
};

// Of x quarter turns, |x| <= 1/2, in quadrant q: Taylor series.
__device__ inline CosSin quarter_turns(float x, uint32_t q) {
  const float z = x * x;
  float s = 1.6044118478735982e-4f, c = -2.5202042373060605e-5f;
  s = fmaf(s, z, -4.6817541353186881e-3f), c = fmaf(c, z, 9.1926027483942659e-4f);
  s = fmaf(s, z, 7.9692626246167046e-2f), c = fmaf(c, z, -2.0863480763352961e-2f);
  s = fmaf(s, z, -6.4596409750624625e-1f), c = fmaf(c, z, 2.5366950790104802e-1f);
  s = fmaf(s, z, 1.5707963267948966f), c = fmaf(c, z, -1.2337005501361698f);
  s *= x, c = fmaf(c, z, 1.0f);
  const float sin = q & 1 ? c : s, cos = q & 1 ? s : c;
  return {q + 1 & 2 ? -cos : cos, q & 2 ? -sin : sin};
}

__device__ inline CosSin rotary_angle(const RotaryArgs& p, const RotaryToken& at, int64_t ha,
                                      int64_t plane) {
  const int64_t hp = p.positions.Hp == 1 ? 0 : ha, hf = p.Hf == 1 ? 0 : ha;
  const int64_t first = (hf * p.P + plane) * p.A;
  if (is_real(p)) {  // products in double, reduced in two parts
    constexpr double kTwoOverPi = 0.63661977236758138, kHigh = 1.5707963267948966,
                     kLow = 6.123233995736766e-17, kRound = 6755399441055744.0;
    double angle = 0;
    for (int64_t a = 0; a < p.A; ++a)
      angle += real_position(p, at, hp, a) * rotary_frequency(p, first + a);
    const double shifted = fma(angle, kTwoOverPi, kRound), quarters = shifted - kRound;
    const double r = fma(-quarters, kLow, fma(-quarters, kHigh, angle));
    return quarter_turns(float(r * kTwoOverPi), uint32_t(__double_as_longlong(shifted)));
  }
  uint64_t turn = 0x80000000u;  // rounds the upper half: -f gives the bits of f
  double poison = 0;            // NaN for frequencies that are not finite
  for (int64_t a = 0; a < p.A; ++a) {
    const double theta = rotary_frequency(p, first + a);
    turn += uint64_t(whole_position(p, at, hp, a)) * turn_of_bits(__double_as_longlong(theta));
    poison += theta - theta;
  }
  const uint32_t upper = uint32_t(turn >> 32), quarter = (upper + 0x20000000u) >> 30;
  return quarter_turns(float(int32_t(upper - (quarter << 30))) * 0x1p-30f + float(poison), quarter);
}

__device__ inline CosSin rotary_entry(const RotaryArgs& p, const RotaryToken& at, int64_t ha,
                                      int64_t plane, bool of_k) {
  const RotaryTable& cos = of_k ? p.cos_k : p.cos_q;
  const RotaryTable& sin = of_k ? p.sin_k : p.sin_q;
  int64_t row = at.t, b = at.b;
  if (p.rows) {
    row = whole_position(p, at, 0, 0), b = 0;
    if (row < 0 || row >= p.rows) __trap();
  }
  return {load_any(cos.data, cos.type, b * cos.b + row * cos.t + ha * cos.h + plane),
          load_any(sin.data, sin.type, b * sin.b + row * sin.t + ha * sin.h + plane)};
}

// How cos and sin lie in shared memory: rows [table][token][head][2][P], a plane where `place`
// says, so that threads with kRun neighbouring planes each read 16 bytes without bank conflicts.
template <int kRun>
__device__ inline int rotary_place(int plane, int P) {
  if constexpr (kRun <= 4) return plane;
  const int i = plane % kRun;
  return (i / 4 * (P / kRun) + plane / kRun) * 4 + i % 4;
}
template <int kRun>
__device__ inline void rotary_read(const float* row, int first, int P, float (&x)[kRun]) {
  if constexpr (kRun == 1) {
    x[0] = row[first];
  } else if constexpr (kRun == 2) {
    const float2 two = *reinterpret_cast<const float2*>(row + first);
    x[0] = two.x, x[1] = two.y;
  } else {
#pragma unroll
    for (int i = 0; i < kRun; i += 4) {
      float four[4];
      load_shared(row + rotary_place<kRun>(first + i, P), four);
#pragma unroll
      for (int j = 0; j < 4; ++j) x[i + j] = four[j];
    }
  }
}

// Angles of `count` heads from ha0 on, of `tokens` tokens, by the whole CTA.
template <int kRun>
__device__ inline void rotary_stage(const RotaryArgs& p, const RotaryToken* tokens, int token_count,
                                    int ha0, int count, float* sAngles) {
  const int P = int(p.P), each = token_count * count * P;
  const int tables = p.cos_k.data ? 2 : 1;
  const float m = float(p.factor), n = float(p.sign * p.factor);
  for (int i = threadIdx.x; i < tables * each; i += blockDim.x) {
    const int plane = i % P, row = i / P, head = row % count, token = row / count % token_count;
    const RotaryToken& at = tokens[token];
    const CosSin x = p.cos_q.data ? rotary_entry(p, at, ha0 + head, plane, i >= each)
                                  : rotary_angle(p, at, ha0 + head, plane);
    float* const to = sAngles + row * 2 * P + rotary_place<kRun>(plane, P);
    to[0] = x.cos * m, to[P] = x.sin * n;
  }
}
}  // namespace df::cuda
