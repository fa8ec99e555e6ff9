// Row norms (gated_norm.h), with f = 1 / V for the gated RMS norm and 1 for the l2norm:
//   r = (f sum x^2 + eps)^-1/2;  n = r x;  y = n weight silu(gate)
// and backwards, with h = dy silu(gate) and d = h weight:
//   dx = r (d - n f <n, d>);  dgate = dy n weight silu'(gate);  dweight = sum over the rows of h n
//
// A row of at most 32 pieces of 128 bits is held by the next power of two of lanes, so that a warp
// works on 1 to 32 rows; a wider one by a warp, the first 4 pieces a lane in registers, the rest
// read again (from L2). The weight's part of a lane stays in registers while it walks down its
// rows; forward, a row that is held is requested while the one before it is computed (32 to 64 KB
// under way an SM). Rows that are not 16-byte aligned are made of pieces of one element.
//
// CTA = 8 warps; backward two CTAs an SM, each with a contiguous part of the rows and one partial
// sum of dweight: in registers, then over the groups of lanes through shared memory, in a fixed
// order. Warps with wide rows have a partial sum each, in memory where it is not held.
// Shared memory: backward 1 KB a piece's element, at most 8.1 KB, free of bank conflicts.
// Registers: at most 64 forward and 128 backward, 128 and 255 for wide rows.
// Bytes an element: 2 e, with a gate 3 e; backward 3 e and 5 e (e bytes an element). FLOPs: 4
// to 40. Bound by memory.
#pragma once
#include "common/cuda/column_sums.cuh"
#include "common/cuda/math.cuh"
#include "common/cuda/pack.cuh"
#include "gated_delta/gated_norm.h"
#include "gated_delta/silu.cuh"

namespace df::cuda {
template <class E_, bool kVectors, bool kWide_>
struct NormConfig {
  using E = E_;
  static constexpr bool kWide = kWide_;
  static constexpr int kVec = kVectors ? 16 / int(sizeof(E)) : 1, kHeld = kWide ? 4 : 1;
  static constexpr int kThreads = RowNormLaunch::kThreads;
  using Row = Pack<E, kVec>;
};

struct NormLanes {                 // this thread among those of a row, a power of two
  int lanes, lane, group, groups;  // groups: of the CTA
  __device__ explicit NormLanes(int lanes) : lanes(lanes), lane(threadIdx.x & (lanes - 1)) {
    const int bits = __ffs(lanes) - 1;
    group = threadIdx.x >> bits, groups = RowNormLaunch::kThreads >> bits;
  }
  __device__ float sum(float x) const {  // in a warp whose lanes are all here
#pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, x, mask);
      if (mask < lanes) x += other;
    }
    return x;
  }
};

// fn(piece i, its first column) for the pieces that this lane holds.
template <class C, class Fn>
__device__ inline void norm_held(const NormLanes& on, int64_t V, Fn fn) {
#pragma unroll
  for (int i = 0; i < C::kHeld; ++i) {
    const int64_t c = int64_t(i * on.lanes + on.lane) * C::kVec;
    if (c < V) fn(i, c);
  }
}
// fn(first column) for the others.
template <class C, class Fn>
__device__ inline void norm_others(const NormLanes& on, int64_t V, Fn fn) {
  if constexpr (C::kWide)
    for (int64_t c = int64_t(C::kHeld * on.lanes + on.lane) * C::kVec; c < V;
         c += on.lanes * C::kVec)
      fn(c);
}

template <class C>
__device__ inline typename C::Row norm_load(const Rows& rows, int64_t row, int64_t c) {
  typename C::Row piece;
  piece.load(static_cast<const typename C::E*>(rows.data) + row * rows.stride + c);
  return piece;
}
template <class C>
__device__ inline void norm_weight(const RowNormLaunch& p, int64_t c, float (&w)[C::kVec]) {
  const auto pieces = [&](auto tag) {
    using W = typename decltype(tag)::type;
    constexpr int kCount = 16 / sizeof(W) < C::kVec ? 16 / sizeof(W) : C::kVec;
#pragma unroll
    for (int i = 0; i < C::kVec; i += kCount) {
      Pack<W, kCount> piece;
      piece.load(static_cast<const W*>(p.args.weight) + c + i);
#pragma unroll
      for (int k = 0; k < kCount; ++k) w[i + k] = piece[k];
    }
  };
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) w[i] = 1;
  if (!p.args.weight) return;
  switch (p.weight_type) {
    case DType::f32: return pieces(Type<float>{});
    case DType::bf16: return pieces(Type<bf16>{});
    case DType::f16: return pieces(Type<f16>{});
    default:
      for (int i = 0; i < C::kVec; ++i)
        w[i] = float(static_cast<const double*>(p.args.weight)[c + i]);
  }
}
template <class C>
__device__ inline float norm_squares(const typename C::Row& x, float sum) {
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) sum += x[i] * x[i];
  return sum;
}
__device__ inline float norm_factor(const RowNormLaunch& p) {
  return p.mean ? 1.0f / float(p.args.V) : 1.0f;
}

template <class C>
__device__ inline void norm_finish(const RowNormLaunch& p, int64_t row, int64_t c, float r,
                                   const typename C::Row& x, const typename C::Row& z,
                                   const float (&w)[C::kVec]) {
  float out[C::kVec];
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) out[i] = x[i] * r * w[i];
  if (p.args.gate.data)
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) out[i] *= silu(z[i]);
  typename C::Row y;
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) y.set(i, out[i]);
  y.store(static_cast<typename C::E*>(p.args.y) + row * p.args.V + c);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kWide ? 2 : 4)
    row_norm_fwd_kernel(const __grid_constant__ RowNormLaunch p, int lanes) {
  const RowNormArgs& args = p.args;
  const NormLanes on(lanes);
  const float factor = norm_factor(p);
  float weight[C::kHeld][C::kVec];
  norm_held<C>(on, args.V, [&](int i, int64_t c) { norm_weight<C>(p, c, weight[i]); });

  const auto pieces_of = [&](int64_t row) {  // a group without a row has no pieces
    return row < p.rows ? args.V : 0;
  };
  typename C::Row x[C::kHeld], z[C::kHeld];
  const auto request = [&](int64_t row) {
    norm_held<C>(on, pieces_of(row), [&](int i, int64_t c) {
      x[i] = norm_load<C>(args.x, row, c);
      if (args.gate.data) z[i] = norm_load<C>(args.gate, row, c);
    });
  };
  const int64_t step = int64_t(gridDim.x) * on.groups;
  if constexpr (!C::kWide) request(int64_t(blockIdx.x) * on.groups + on.group);
  for (int64_t first = int64_t(blockIdx.x) * on.groups; first < p.rows; first += step) {
    const int64_t row = first + on.group, V = pieces_of(row);
    if constexpr (C::kWide) request(row);
    typename C::Row x_row[C::kHeld], z_row[C::kHeld];
#pragma unroll
    for (int i = 0; i < C::kHeld; ++i) x_row[i] = x[i], z_row[i] = z[i];
    if constexpr (!C::kWide) request(row + step);
    float sum = 0;
    norm_held<C>(on, V, [&](int i, int64_t) { sum = norm_squares<C>(x_row[i], sum); });
    norm_others<C>(on, V,
                   [&](int64_t c) { sum = norm_squares<C>(norm_load<C>(args.x, row, c), sum); });
    const float r = rsqrtf(on.sum(sum) * factor + float(args.eps));
    norm_held<C>(on, V, [&](int i, int64_t c) {
      norm_finish<C>(p, row, c, r, x_row[i], z_row[i], weight[i]);
    });
    norm_others<C>(on, V, [&](int64_t c) {
      float w[C::kVec];
      norm_weight<C>(p, c, w);
      typename C::Row gate;
      if (args.gate.data) gate = norm_load<C>(args.gate, row, c);
      norm_finish<C>(p, row, c, r, norm_load<C>(args.x, row, c), gate, w);
    });
  }
}

// One piece backwards: d = h weight and h n; stores dgate.
template <class C>
__device__ inline void norm_piece(const RowNormLaunch& p, int64_t row, int64_t c, float r,
                                  const typename C::Row& x, const typename C::Row& z,
                                  const typename C::Row& dy, const float (&w)[C::kVec],
                                  float (&d)[C::kVec], float (&hn)[C::kVec]) {
  typename C::Row dgate;
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) {
    const float n = x[i] * r;
    float h = dy[i];
    if (p.args.gate.data) {
      const float s = sigmoid(z[i]);
      dgate.set(i, h * n * w[i] * s * (1 + z[i] * (1 - s)));
      h *= z[i] * s;
    }
    d[i] = h * w[i], hn[i] = h * n;
  }
  if (p.args.gate.data) dgate.store(static_cast<typename C::E*>(p.args.dgate) + row * p.args.V + c);
}
template <class C>
__device__ inline void norm_store_dx(const RowNormLaunch& p, int64_t row, int64_t c, float r,
                                     float along, const typename C::Row& x,
                                     const float (&d)[C::kVec]) {
  typename C::Row dx;
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) dx.set(i, (d[i] - x[i] * r * along) * r);
  dx.store(static_cast<typename C::E*>(p.args.y) + row * p.args.V + c);
}

// The pieces of a wide row that are not held. `add` (the first look): to <n, d> and to dweight.
template <class C>
__device__ inline float norm_other_pieces(const RowNormLaunch& p, const NormLanes& on, int64_t V,
                                          int64_t row, float r, bool add, bool first, float along,
                                          float* partial) {
  norm_others<C>(on, V, [&](int64_t c) {
    typename C::Row z;
    const typename C::Row x = norm_load<C>(p.args.x, row, c);
    if (p.args.gate.data) z = norm_load<C>(p.args.gate, row, c);
    float w[C::kVec], d[C::kVec], hn[C::kVec];
    norm_weight<C>(p, c, w);
    norm_piece<C>(p, row, c, r, x, z, norm_load<C>(p.args.dy, row, c), w, d, hn);
    if (!add) return norm_store_dx<C>(p, row, c, r, along, x, d);
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) along += x[i] * r * d[i];
    if (!p.partial) return;
    Pack<float, C::kVec> sums;
    first ? sums.zero() : sums.load(partial + c);
#pragma unroll
    for (int i = 0; i < C::kVec; ++i) sums.set(i, sums[i] + hn[i]);
    sums.store(partial + c);
  });
  return along;
}

// This CTA's partial sum of dweight from those of its groups, one after the other.
template <class C>
__device__ inline void norm_cta_sums(const RowNormLaunch& p, const NormLanes& on,
                                     const float (&sums)[C::kVec]) {
  constexpr int kStride = C::kThreads + 32 / C::kVec;  // both ways free of bank conflicts
  __shared__ float shared[kStride * C::kVec];
  const int width = on.lanes * C::kVec;
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) shared[i * kStride + threadIdx.x] = sums[i];
  __syncthreads();
  for (int c = threadIdx.x; c < width && c < p.args.V; c += C::kThreads) {
    float total = 0;
    for (int g = 0; g < on.groups; ++g)
      total += shared[c % C::kVec * kStride + g * on.lanes + c / C::kVec];
    p.partial[blockIdx.x * p.args.V + c] = total;
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kWide ? 1 : 2)
    row_norm_bwd_kernel(const __grid_constant__ RowNormLaunch p, int lanes) {
  const RowNormArgs& args = p.args;
  const NormLanes on(lanes);
  const float factor = norm_factor(p);
  float weight[C::kHeld][C::kVec], sums[C::kHeld][C::kVec] = {};
  norm_held<C>(on, args.V, [&](int i, int64_t c) { norm_weight<C>(p, c, weight[i]); });
  float* const partial = p.partial + (int64_t(blockIdx.x) * on.groups + on.group) * args.V;  // wide

  const int64_t each = (p.rows + gridDim.x - 1) / gridDim.x;
  const int64_t begin = blockIdx.x * each, end = begin + each < p.rows ? begin + each : p.rows;
  for (int64_t first = begin; first < end; first += on.groups) {
    const int64_t row = first + on.group;
    const int64_t V = row < end ? args.V : 0;
    typename C::Row x[C::kHeld], z[C::kHeld], dy[C::kHeld];
    float sum = 0, along = 0, d[C::kHeld][C::kVec];
    norm_held<C>(on, V, [&](int i, int64_t c) {
      x[i] = norm_load<C>(args.x, row, c);
      dy[i] = norm_load<C>(args.dy, row, c);
      if (args.gate.data) z[i] = norm_load<C>(args.gate, row, c);
    });
    norm_held<C>(on, V, [&](int i, int64_t) { sum = norm_squares<C>(x[i], sum); });
    norm_others<C>(on, V,
                   [&](int64_t c) { sum = norm_squares<C>(norm_load<C>(args.x, row, c), sum); });
    const float r = 1.0f / sqrtf(on.sum(sum) * factor + float(args.eps));
    norm_held<C>(on, V, [&](int i, int64_t c) {
      float hn[C::kVec];
      norm_piece<C>(p, row, c, r, x[i], z[i], dy[i], weight[i], d[i], hn);
#pragma unroll
      for (int w = 0; w < C::kVec; ++w) along += x[i][w] * r * d[i][w], sums[i][w] += hn[w];
    });
    along = norm_other_pieces<C>(p, on, V, row, r, true, first == begin, along, partial);
    along = on.sum(along) * factor;
    norm_held<C>(on, V,
                 [&](int i, int64_t c) { norm_store_dx<C>(p, row, c, r, along, x[i], d[i]); });
    norm_other_pieces<C>(p, on, V, row, r, false, false, along, partial);
  }
  if (!p.partial) return;
  if constexpr (!C::kWide) return norm_cta_sums<C>(p, on, sums[0]);
  Pack<float, C::kVec> total;
  norm_held<C>(on, args.V, [&](int i, int64_t c) {
#pragma unroll
    for (int w = 0; w < C::kVec; ++w) total.set(w, sums[i][w]);
    total.store(partial + c);
  });
  total.zero();
  if (begin + on.group >= end)  // a warp without a row
    norm_others<C>(on, args.V, [&](int64_t c) { total.store(partial + c); });
}

// fn(NormConfig, lanes a row)
template <class E, class Fn>
void norm_dispatch(const RowNormLaunch& p, Fn fn) {
  const int64_t pieces = p.vectors ? p.args.V / int64_t(16 / sizeof(E)) : p.args.V;
  int lanes = 1;
  while (lanes < 32 && lanes < pieces) lanes *= 2;
  if (p.vectors)
    p.wide() ? fn(NormConfig<E, true, true>{}, lanes) : fn(NormConfig<E, true, false>{}, lanes);
  else
    p.wide() ? fn(NormConfig<E, false, true>{}, lanes) : fn(NormConfig<E, false, false>{}, lanes);
}

template <class E>
void row_norm_fwd_launch(const RowNormLaunch& p, void* stream) {
  constexpr int64_t kCtas = 4 * 132;  // walk down the rows; where rows are not wide, all at once
  if (p.rows == 0) return;
  norm_dispatch<E>(p, [&](auto config, int lanes) {
    row_norm_fwd_kernel<decltype(config)><<<unsigned(p.ctas(kCtas)), RowNormLaunch::kThreads, 0,
                                            static_cast<cudaStream_t>(stream)>>>(p, lanes);
  });
}
template <class E>
void row_norm_bwd_launch(const RowNormLaunch& p, void* dweight, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  if (p.rows != 0)
    norm_dispatch<E>(p, [&](auto config, int lanes) {
      row_norm_bwd_kernel<decltype(config)>
          <<<unsigned(p.backward_ctas()), RowNormLaunch::kThreads, 0, stream>>>(p, lanes);
    });
  if (dweight)
    column_sums(p.partial, p.partial_rows(), p.args.V, DenseSums{dweight, p.weight_type}, stream);
}
}  // namespace df::cuda
