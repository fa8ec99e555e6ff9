// Backward pass of the rotation with gradients of angles, positions or tables (rotary.h):
//   dx = R^T dy,   df = sg (dy1 y0 - dy0 y1),   or of tables
//   dC = dy0 x0 + dy1 x1,  dS = sg (dy1 x0 - dy0 x1)
//
// CTA = consecutive tokens, one after the other, 256 threads; at most 528 CTAs whatever the device,
// so that the order of all sums is fixed. A token: its angles to shared memory; for a tile of its
// heads the rows as in rotary_kernel.cuh, which leave their cross products (and dot products) in
// shared memory; then the thread that owns (angle head, plane) adds them in the order of the heads.
// Angles: it adds position times that sum to its part of dfreqs (double), and warps add frequency
// times sum over the planes for dposition. Tables: the sums are stored. Angle heads that do not fit
// together are taken in several passes over the tokens. A second launch adds the CTAs' parts.
//
// Shared memory: at most 24 KB of angles and sums (32 KB with many axes) and 16 KB of products.
// Registers: at most 104, no spills; two CTAs an SM. Bytes: dy and y read, dx written: 3 e D a
// token and head, in 128-bit accesses; parts of dfreqs 8 P A a CTA. Bound by memory, four
// independent loads a thread in flight.
#pragma once
#include "grape/rotary_kernel.cuh"

namespace df::cuda {
__device__ inline double warp_sum(double x) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  return x;
}

struct RotaryShared {  // of a backward pass; one token
  float *angles, *cross, *dot, *sums;
  double* parts;  // [head, P, A]

  __device__ RotaryShared(const RotaryLaunch& x, float* memory) {
    const int P = int(x.args.P), heads = x.heads;
    const int tables = x.args.cos_k.data ? 2 : 1;
    parts = reinterpret_cast<double*>(memory);
    angles = memory + (x.grads.angles ? 2 * heads * P * int(x.args.A) : 0);
    cross = angles + 2 * tables * heads * P;
    dot = cross + x.tile * P;
    sums = dot + (x.grads.angles ? 0 : x.tile * P);
  }
};

// Rows [first, first + n) of a token: dx, and products to shared memory.
template <class C>
__device__ inline void rotary_products(const RotaryLaunch& x, const RotaryToken& at,
                                       const RotaryRows& rows, int count, int first, int n,
                                       const RotaryShared& s) {
  using E = typename C::E;
  const RotaryArgs& p = x.args;
  const int P = int(p.P), runs = P / C::kRun;
  const int across = min(runs, kRotaryThreads), stride = kRotaryThreads / max(across, 1);
  const bool distinct = p.cos_k.data != nullptr;
  if (runs == 0 || int(threadIdx.x) >= across * stride) return;
  for (int run = threadIdx.x % across; run < runs; run += across) {
    const int plane = run * C::kRun;
    for (int r = threadIdx.x / across; r < n; r += stride) {
      const int row = first + r, head = rows.head(row);
      const bool k = rows.is_k(row);
      const RotaryHeads &from = k ? p.k : p.q, &saved = k ? x.grads.saved_k : x.grads.saved_q;
      const RotaryOutput& out = k ? p.y_k : p.y_q;
      RotaryPair<C> d, z;
      d.load(static_cast<const E*>(from.data) + rotary_offset(from, at, head), plane, P,
             p.interleaved);
      z.load(static_cast<const E*>(saved.data) + rotary_offset(saved, at, head), plane, P,
             p.interleaved);
#pragma unroll
      for (int i = 0; i < C::kRun; ++i) {
        s.cross[r * P + plane + i] = d.x1[i] * z.x0[i] - d.x0[i] * z.x1[i];
        if (!x.grads.angles) s.dot[r * P + plane + i] = d.x0[i] * z.x0[i] + d.x1[i] * z.x1[i];
      }
      const int ha = p.Ha == 1 ? 0 : rows.angle_head(row);
      d.rotate(s.angles + ((k && distinct ? count : 0) + ha) * 2 * P, plane, P);
      d.store(static_cast<E*>(out.data) + rotary_offset(out, at, head), plane, P, p.interleaved);
    }
  }
}

// Adds the tile's products of every (angle head, plane), in the order of rows.
__device__ inline void rotary_add(const RotaryLaunch& x, const RotaryRows& rows, int count,
                                  int first, int n, const RotaryShared& s) {
  const int P = int(x.args.P), kinds = x.grads.angles ? 1 : 2;
  const bool distinct = !x.grads.angles && x.args.cos_k.data;
  for (int i = threadIdx.x; i < kinds * count * P; i += blockDim.x) {
    const int plane = i % P, ha = i / P % count, kind = i / P / count;
    const float* const from = kind ? s.dot : s.cross;
    const auto add = [&](int begin, int end, float* to) {
      float sum = first == 0 ? 0 : *to;
      for (int r = max(begin, first); r < min(end, first + n); ++r)
        sum += from[(r - first) * P + plane];
      *to = sum;
    };
    float* const to = s.sums + i;
    add(ha * rows.group_q, (ha + 1) * rows.group_q, to);
    const int k0 = rows.of_q + ha * rows.group_k, k1 = k0 + rows.group_k;
    if (distinct) {
      add(k0, k1, to + kinds * count * P);
    } else {
      float sum = *to;
      for (int r = max(k0, first); r < min(k1, first + n); ++r)
        sum += from[(r - first) * P + plane];
      *to = sum;
    }
  }
}

// What the sums of a token are for, when all of its rows are added.
__device__ inline void rotary_use(const RotaryLaunch& x, const RotaryToken& at, int64_t n, int ha0,
                                  int count, const RotaryShared& s) {
  const RotaryArgs& p = x.args;
  const int P = int(p.P), A = int(p.A);
  const float sign = float(x.grads.sign), m = float(p.factor);
  if (!x.grads.angles) {
    const int tables = p.cos_k.data ? 2 : 1;
    for (int i = threadIdx.x; i < tables * count * P; i += blockDim.x) {
      const int plane = i % P, ha = i / P % count, table = i / P / count;
      const float* const sums = s.sums + table * 2 * count * P + ha * P + plane;
      const int64_t to = (n * p.Ha + ha0 + ha) * P + plane;
      static_cast<float*>(table ? x.grads.dcos_k : x.grads.dcos_q)[to] = m * sums[count * P];
      static_cast<float*>(table ? x.grads.dsin_k : x.grads.dsin_q)[to] = sign * m * sums[0];
    }
    return;
  }
  const bool one_f = p.Hf == 1, one_p = p.positions.Hp == 1;
  for (int i = threadIdx.x; i < (one_f ? 1 : count) * P * A; i += blockDim.x) {
    const int a = i % A, plane = i / A % P, hf = i / A / P;
    double sum = 0;
    for (int ha = hf; ha < (one_f ? count : hf + 1); ++ha)
      sum += real_position(p, at, one_p ? 0 : ha0 + ha, a) * double(sign * s.sums[ha * P + plane]);
    s.parts[i] += sum;
  }
  if (!x.grads.dpositions) return;
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x / 32; i < (one_p ? 1 : count) * A; i += kRotaryThreads / 32) {
    const int a = i % A, hp = i / A;
    double sum = 0;
    for (int ha = hp; ha < (one_p ? count : hp + 1); ++ha)
      for (int plane = lane; plane < P; plane += 32)
        sum += rotary_frequency(p, ((one_f ? 0 : ha0 + ha) * int64_t(P) + plane) * A + a) *
               double(sign * s.sums[ha * P + plane]);
    sum = warp_sum(sum);
    double* const to = x.grads.dpositions + (n * p.positions.Hp + (one_p ? 0 : ha0 + hp)) * A + a;
    if (lane == 0) *to = one_p && ha0 > 0 ? *to + sum : sum;
  }
}

template <class C>
__global__ void __launch_bounds__(kRotaryThreads, 2)
    rotary_grads_kernel(const __grid_constant__ RotaryLaunch x) {
  extern __shared__ float4 shared[];
  __shared__ RotaryToken sToken;
  const RotaryArgs& p = x.args;
  const RotaryShared s(x, reinterpret_cast<float*>(shared));
  const int P = int(p.P), A = int(p.A);
  const int64_t n0 = blockIdx.x * int64_t(x.tokens), n1 = min(n0 + x.tokens, p.B * p.T);
  for (int ha0 = 0; ha0 < p.Ha; ha0 += x.heads) {
    const int count = min(x.heads, int(p.Ha) - ha0);
    const int columns = x.grads.angles ? (p.Hf == 1 ? 1 : count) * P * A : 0;
    const RotaryRows rows(p, ha0, count);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) s.parts[i] = 0;
    for (int64_t n = n0; n < n1; ++n) {
      if (threadIdx.x == 0) sToken = rotary_token(p, n);
      __syncthreads();
      rotary_stage<C::kRun>(p, &sToken, 1, ha0, count, s.angles);
      rotary_rest<C>(p, &sToken, 1, rows);
      for (int first = 0; first < rows.per_token; first += x.tile) {
        const int here = min(x.tile, rows.per_token - first);
        __syncthreads();
        rotary_products<C>(x, sToken, rows, count, first, here, s);
        __syncthreads();
        rotary_add(x, rows, count, first, here, s);
      }
      __syncthreads();
      rotary_use(x, sToken, n, ha0, count, s);
      __syncthreads();
    }
    if (columns == 0) continue;
    double* const to = x.parts + (blockIdx.x * p.Hf + (p.Hf == 1 ? 0 : ha0)) * P * A;
    for (int i = threadIdx.x; i < columns; i += blockDim.x)
      to[i] = p.Hf == 1 && ha0 > 0 ? to[i] + s.parts[i] : s.parts[i];
    __syncthreads();
  }
}

template <class C>
void rotary_launch(const RotaryLaunch& x, bool grads, cudaStream_t stream) {
  const RotaryArgs& p = x.args;
  const int64_t blocks = (p.B * p.T + x.tokens - 1) / x.tokens;
  const int64_t floats = x.heads * rotary_head_floats(p, grads, x.grads.angles);
  if (grads) {
    const size_t shared = (floats + rotary_tile_floats(x)) * sizeof(float);
    rotary_grads_kernel<C><<<blocks, kRotaryThreads, shared, stream>>>(x);
  } else {
    const int64_t groups = (p.Ha + x.heads - 1) / x.heads;
    const size_t shared = x.tokens * floats * sizeof(float);
    rotary_kernel<C><<<blocks * groups, kRotaryThreads, shared, stream>>>(p, x.tokens, x.heads);
  }
}

template <class E>
void rotary_dispatch(const RotaryLaunch& x, bool grads, void* stream_) {
  constexpr int kVec = 16 / sizeof(E);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_);
  if (!x.vectors) return rotary_launch<RotaryConfig<E, 1, false>>(x, grads, stream);
  if (x.args.interleaved) return rotary_launch<RotaryConfig<E, kVec, true>>(x, grads, stream);
  rotary_launch<RotaryConfig<E, kVec, false>>(x, grads, stream);
}
}  // namespace df::cuda
