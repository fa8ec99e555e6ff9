// What the rotation's kernels share: how a row lies in the lanes of a group, angles, sums.
#pragma once
#include "common/cuda/load.cuh"
#include "grape/frame_cuda.h"

namespace df::cuda {
// A group of kLanes lanes has a row of up to 8 kLanes channels, 8 a lane.
template <class E_, int kLanes_, bool kVectors>
struct FrameConfig {
  using E = E_;
  static constexpr int kLanes = kLanes_, kSlice = 8, kTile = kLanes * kSlice;
  static constexpr int kVec = kVectors ? 16 / int(sizeof(E)) : 1;
  static constexpr int kThreads = 128, kGroups = kThreads / kLanes;

  // element n of a lane's slice in a row, and in shared memory: 128-bit reads without conflicts
  __device__ static int channel(int lane, int n) {
    return (n / kVec * kLanes + lane) * kVec + n % kVec;
  }
  __device__ static int staged(int channel) {
    const int access = channel / kVec, n = access / kLanes * kVec + channel % kVec;
    return (n / 4 * kLanes + access % kLanes) * 4 + n % 4;
  }
};

// The most planes of W in shared memory.
template <class C>
constexpr int kChunkPlanes = (32 << 10) / int(2 * C::kTile * sizeof(float));

// Token n of [B, T], head h.
__device__ inline int64_t row_of(const FrameArgs& p, const FrameRows& rows, int64_t n, int h) {
  if (p.B == 1) return n * rows.t + h * rows.h;
  const uint32_t T = uint32_t(p.T), b = uint32_t(n) / T;
  return b * rows.b + (uint32_t(n) - b * T) * rows.t + h * rows.h;
}

template <class C>
__device__ inline void load_slice(const void* data, int64_t row, int D, int lane, bool there,
                                  float (&x)[C::kSlice]) {
  const auto* from = static_cast<const typename C::E*>(data) + row;
#pragma unroll
  for (int i = 0; i < C::kSlice; i += C::kVec) {
    float part[C::kVec] = {};
    const int d = C::channel(lane, i);
    if (there && d < D) load_vector<C::kVec>(from + d, part);
#pragma unroll
    for (int w = 0; w < C::kVec; ++w) x[i + w] = part[w];
  }
}
template <class C>
__device__ inline void store_slice(void* data, int64_t row, int D, int lane,
                                   const float (&x)[C::kSlice]) {
  auto* to = static_cast<typename C::E*>(data) + row;
#pragma unroll
  for (int i = 0; i < C::kSlice; i += C::kVec) {
    float part[C::kVec];
    const int d = C::channel(lane, i);
#pragma unroll
    for (int w = 0; w < C::kVec; ++w) part[w] = x[i + w];
    if (d < D) store_vector<C::kVec>(to + d, part);
  }
}

// Columns 2 first to 2 (first + planes) of the head's W as sW[column][staged channel]; planes
// beyond r are zero. A warp loads sectors of several channels: its stores to different columns,
// which are on one bank, are few, and several loads of a thread are on their way.
template <class C, class Element>
__device__ inline void stage_columns(const Element* W, int D, int r, int first, int planes,
                                     float* sW) {
  constexpr int kAcross = 32 / int(sizeof(Element)), kRows = C::kThreads / kAcross;
  constexpr int kBatch = 4;
  static_assert(C::kTile % (kRows * kBatch) == 0 || C::kTile / kRows < kBatch);
  constexpr int kCount = C::kTile / kRows < kBatch ? C::kTile / kRows : kBatch;
#pragma unroll 1  // registers
  for (int c = threadIdx.x % kAcross; c < 2 * planes; c += kAcross)
#pragma unroll 1
    for (int d = threadIdx.x / kAcross; d < C::kTile; d += kCount * kRows) {
      Element w[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const int row = d + i * kRows, column = 2 * first + c;
        const bool inside = row < D && column < 2 * r;
        w[i] = inside ? W[row * 2 * r + column] : Element(0);
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) sW[c * C::kTile + C::staged(d + i * kRows)] = float(w[i]);
    }
}
template <class C>
__device__ inline void stage_frame(const FrameCuda& p, int h, int first, int planes, float* sW,
                                   double* sTheta) {
  const int D = int(p.args.D), r = int(p.args.r);
  const int64_t head = int64_t(h) * D * 2 * r;
  if (p.W_double)
    stage_columns<C>(static_cast<const double*>(p.W) + head, D, r, first, planes, sW);
  else
    stage_columns<C>(static_cast<const float*>(p.W) + head, D, r, first, planes, sW);
  for (int k = threadIdx.x; k < planes; k += C::kThreads)
    sTheta[k] = first + k < r ? p.args.theta[int64_t(h) * r + first + k] : 0;
}
template <class C>
__device__ inline void load_column(const float* sW, int column, int lane, float (&w)[C::kSlice]) {
#pragma unroll
  for (int n = 0; n < C::kSlice; n += 4) {
    float part[4];
    load_shared(sW + column * C::kTile + (n / 4 * C::kLanes + lane) * 4, part);
#pragma unroll
    for (int i = 0; i < 4; ++i) w[n + i] = part[i];
  }
}

// t theta: the exact product in two parts, reduced by 2 pi in two parts, then the Taylor series of
// its half's sine and cosine. NaN from 2^50 on, where the angle has no digit left.
struct Angle {
  float sin, cos;  // of the half

  __device__ Angle(double t, double theta) {
    constexpr double kTurn = 6.283185307179586, kTurnLow = 2.4492935982947064e-16;
    const double high = t * theta, low = fma(t, theta, -high), n = rint(high * (1 / kTurn));
    double angle = fma(-n, kTurnLow, fma(-n, kTurn, high)) + low;
    if (!(fabs(high) < 0x1p50)) angle = __longlong_as_double(0x7ff8000000000000);
    const float x = float(0.5 * angle), rest = float(0.5 * angle - x), z = x * x;
    float s = 1.f / 6227020800;
    s = s * z - 1.f / 39916800, s = s * z + 1.f / 362880, s = s * z - 1.f / 5040;
    s = s * z + 1.f / 120, s = s * z - 1.f / 6;
    float c = -1.f / 87178291200;
    c = c * z + 1.f / 479001600, c = c * z - 1.f / 3628800, c = c * z + 1.f / 40320;
    c = c * z - 1.f / 720, c = c * z + 1.f / 24, c = c * z - 0.5f;
    const float sine = x + x * z * s, cosine = 1 + z * c;
    sin = sine + cosine * rest, cos = cosine - sine * rest;
  }
  // sin and cos - 1 of the angle; the latter from the smaller square, so that no digits are lost
  __device__ float turn() const { return 2 * sin * cos; }
  __device__ float less_one() const {
    const float s = sin * sin, c = cos * cos;
    return s < c ? -2 * s : 2 * c - 2;
  }
};

// I(om, t) = even I + odd Jc from sine and cosine of t om / 2, or its series for small angles.
struct Integral {
  float even, odd;

  __device__ Integral(float sin, float cos, float t, float omega) {
    const float z = t * omega, w = z * z;
    if (fabsf(z) < 0.125f) {
      even = t * (1 + w * (-1.f / 6 + w * (1.f / 120 - w / 5040)));
      odd = t * z * (0.5f + w * (-1.f / 24 + w * (1.f / 720 - w / 40320)));
    } else {
      even = 2 * sin * cos / omega, odd = 2 * sin * sin / omega;
    }
  }
};

// The coefficients of dW = sum_n g u^T + x v^T (or P) for a plane, from c and e.
struct Outer {
  float u0, u1, v0, v1;

  __device__ Outer(const Angle& at, float c0, float c1, float e0, float e1, float t, float theta,
                   bool generator) {
    const float turn = at.turn(), less_one = at.less_one();
    const float d0 = e0 * less_one - e1 * turn, d1 = e0 * turn + e1 * less_one;
    if (generator) {
      const Integral I(at.sin, at.cos, t, theta);
      const float b0 = e0 + d0, b1 = e1 + d1;
      u0 = I.even * c0 + I.odd * c1, u1 = I.even * c1 - I.odd * c0;
      v0 = -I.even * b0 - I.odd * b1, v1 = I.odd * b0 - I.even * b1;
    } else {
      u0 = c0 * less_one + c1 * turn, u1 = c1 * less_one - c0 * turn;
      v0 = d0, v1 = d1;
    }
  }
};

// Sums over the group's lanes of kValues numbers for each of kTokens tokens: each step halves the
// tokens of a lane. Afterwards v[0] has the sums of token lane / (kLanes / kTokens).
template <int kLanes, int kTokens, int kValues>
__device__ inline void scatter_sums(float (&v)[kTokens][kValues], int lane) {
#pragma unroll
  for (int half = kTokens / 2; half >= 1; half /= 2) {
    const int mask = kLanes * half / kTokens;
    const bool upper = lane & mask;
#pragma unroll
    for (int i = 0; i < half; ++i)
#pragma unroll
      for (int c = 0; c < kValues; ++c) {
        const float sent = upper ? v[i][c] : v[i + half][c];
        const float kept = upper ? v[i + half][c] : v[i][c];
        v[i][c] = kept + __shfl_xor_sync(0xffffffffu, sent, mask);
      }
  }
#pragma unroll
  for (int mask = kLanes / kTokens / 2; mask >= 1; mask /= 2)
#pragma unroll
    for (int c = 0; c < kValues; ++c) v[0][c] += __shfl_xor_sync(0xffffffffu, v[0][c], mask);
}
// The number that the owner of token i has.
template <int kLanes, int kTokens>
__device__ inline float from_token(float x, int i) {
  return __shfl_sync(0xffffffffu, x, i * (kLanes / kTokens), kLanes);
}

// Spans of equal steps, as many as are resident at once (ctas_of_sm on each of 132 SMs): W is
// staged once a span. At most `most` steps each, so that many steps are several waves.
inline void spread_steps(FrameCuda& p, int tokens_a_step, int ctas_of_sm, int64_t most) {
  const int64_t tokens = p.args.B * p.args.T, ctas = ctas_of_sm * 132;
  const int64_t steps = (tokens + tokens_a_step - 1) / tokens_a_step;
  const int64_t each = (steps * p.args.H + ctas - 1) / ctas, here = each < most ? each : most;
  p.span = here * tokens_a_step;
  p.splits = (steps + here - 1) / here;
}

// fn(FrameConfig) for the width and alignment of the rows.
template <class E, class Fn>
void with_frame_config(const FrameCuda& p, Fn fn) {
  if (!p.vectors) return fn(FrameConfig<E, 32, false>{});
  if (p.args.D <= 64) return fn(FrameConfig<E, 8, true>{});
  if (p.args.D <= 128) return fn(FrameConfig<E, 16, true>{});
  fn(FrameConfig<E, 32, true>{});
}
}  // namespace df::cuda
