// Forward of the rotation for more than kFrameFused planes and rows of bfloat16 or float16, D <=
// 128, on tensor cores: C = X W, the planes' change d (frame_fwd.cuh), Y = X + d W^T. W and d go as
// two 16-bit numbers, high and low part, so that W stays orthonormal to 2^-17 (bfloat16; 2^-22):
//   C = X Wh + X Wl,   Y = X + dh Wh^T + dh Wl^T + dl Wh^T,   sums in float32.
//
// CTA: 4 warps, one head, a span of tokens; a warp has 16 tokens at a time, tokens as rows of
// mma.m16n8k16. Rows stay in registers from load to store: lane (g, c) has channels
// 32 j + 8 c .. + 7 of tokens g and g + 8, 16 bytes each, and the order of channels within the
// products is chosen so that these are its elements of A (C's product) and of the accumulator
// (Y's). An accumulator of C has both coordinates of a plane in one lane, which takes its angle;
// two of them are an A of Y's product as they are. There are no shuffles and no shared memory for
// rows. Shared memory: fragments of W for both products, lane by lane, high and low part in 128
// bits: 128 kBlocks (32 bytes D) a plane: 16 KB for 8 planes of 128 channels, 128 KB for 64.
// Registers: 8 kBlocks of x, as many of the next step's x (backward: of g), 16 kBlocks of y; at
// most 168 for D <= 64, 3 CTAs an SM. D = 128 takes 244 (backward 255): of 8 warps an SM 32 KB of
// rows are on their way while the step before is computed.
// Bytes: 4 D a token and head; backward 6 D + 16 r + 4. FLOPs: 20 r D on tensor cores, about 60
// instructions an angle. Bound by memory up to r = 16 (D = 128), then by the tensor cores.
#pragma once
#include <type_traits>

#include "common/cuda/mma_sm80.cuh"
#include "common/cuda/reduce.cuh"
#include "grape/frame_fwd.cuh"

namespace df::cuda {
__device__ inline uint32_t bits_of(float x, bf16) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
__device__ inline uint32_t bits_of(float x, f16) {
  return __half_as_ushort(__float2half_rn(x));
}
template <class E>
__device__ inline float value_of(uint32_t bits) {
  return to_float(E{uint16_t(bits)});
}

// Two numbers as pairs of 16 bits: high parts, and what these leave. float16's high part stops at
// its largest number, so that the sum reaches twice as far.
template <class E>
__device__ inline uint32_t high_part(float x) {
  constexpr float kLargest = 65504;
  return bits_of(std::is_same_v<E, f16> ? fminf(fmaxf(x, -kLargest), kLargest) : x, E{});
}
template <class E>
__device__ inline void split(float x, float y, uint32_t& high, uint32_t& low) {
  const uint32_t a = high_part<E>(x), b = high_part<E>(y);
  high = a | b << 16;
  low = bits_of(x - value_of<E>(a), E{}) | bits_of(y - value_of<E>(b), E{}) << 16;
}

template <class E_, int kBlocks_>
struct FrameMma {  // 32 kBlocks channels; planes in chunks of 8, the K of an mma
  using E = E_;
  static constexpr int kBlocks = kBlocks_, kThreads = 128, kTokens = 64, kPlanes = 8;
  static constexpr int kFirst = 2 * 2 * kBlocks, kSecond = 4 * kBlocks;  // fragments a chunk
  static constexpr int kChunkBytes = (kFirst + kSecond) * 32 * int(sizeof(uint4));
};

// Fragments (high b0, high b1, low b0, low b1) of the head's W.
//   first:  [chunk][tile of 8 columns][step][lane], K is channels
//   second: [chunk][tile of 8 channels][lane], K is columns
// The loads of several fragments are on their way at once.
template <class C, class Element>
__device__ inline void stage_fragments(const Element* W, int D, int columns, int chunks,
                                       uint4* sFirst, uint4* sSecond) {
  const auto w = [&](int d, int column) -> float {
    return d < D && column < columns ? float(W[d * columns + column]) : 0.f;
  };
#pragma unroll 4
  for (int i = threadIdx.x; i < chunks * C::kFirst * 32; i += C::kThreads) {
    const int c = i % 4, g = i / 4 % 8, step = i / 32 % (2 * C::kBlocks);
    const int column = i / (64 * C::kBlocks) * 8 + g, d = 16 * (step & ~1) + 8 * c + step % 2 * 4;
    uint4 f;
    split<typename C::E>(w(d, column), w(d + 1, column), f.x, f.z);
    split<typename C::E>(w(d + 2, column), w(d + 3, column), f.y, f.w);
    sFirst[i] = f;
  }
#pragma unroll 4
  for (int i = threadIdx.x; i < chunks * C::kSecond * 32; i += C::kThreads) {
    const int c = i % 4, g = i / 4 % 8, tile = i / 32 % C::kSecond;
    const int column = i / (32 * C::kSecond) * 16 + 2 * c;
    const int d = tile / 4 * 32 + g / 2 * 8 + tile % 4 * 2 + g % 2;
    uint4 f;
    split<typename C::E>(w(d, column), w(d, column + 1), f.x, f.z);
    split<typename C::E>(w(d, column + 8), w(d, column + 9), f.y, f.w);
    sSecond[i] = f;
  }
}

// 16 bytes of each block of 32 channels of two tokens; zeros for absent ones.
template <class C>
__device__ inline void load_rows(const FrameCuda& p, const FrameRows& rows, const int64_t (&n)[2],
                                 int64_t last, int h, int c, uint32_t (&x)[2][C::kBlocks][4]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const auto* const row =
        static_cast<const typename C::E*>(rows.data) + row_of(p.args, rows, n[i], h) + 8 * c;
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (n[i] < last && 32 * j + 8 * c < p.args.D)
        raw = __ldcg(reinterpret_cast<const uint4*>(row + 32 * j));
      x[i][j][0] = raw.x, x[i][j][1] = raw.y, x[i][j][2] = raw.z, x[i][j][3] = raw.w;
    }
  }
}
template <class C>
__device__ inline void store_rows(const FrameCuda& p, const int64_t (&n)[2], int64_t last, int h,
                                  int c, const float (&y)[C::kBlocks][4][4]) {
  using E = typename C::E;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (n[i] >= last) continue;
    E* const row = static_cast<E*>(p.args.y) + (n[i] * p.args.H + h) * p.args.D + 8 * c;
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j) {
      uint32_t pair[4];
#pragma unroll
      for (int q = 0; q < 4; ++q)
        pair[q] = bits_of(y[j][q][2 * i], E{}) | bits_of(y[j][q][2 * i + 1], E{}) << 16;
      if (32 * j + 8 * c < p.args.D)
        __stcg(reinterpret_cast<uint4*>(row + 32 * j),
               make_uint4(pair[0], pair[1], pair[2], pair[3]));
    }
  }
}

// point += x W for one tile of 8 columns and one step of 16 channels.
template <class C>
__device__ inline void add_step(float (&point)[4], const uint32_t (&x)[2][C::kBlocks][4], int s,
                                const uint4& w) {
  const int j = s / 2, q = s % 2 * 2;
  const uint32_t a[4] = {x[0][j][q], x[1][j][q], x[0][j][q + 1], x[1][j][q + 1]};
  sm80::multiply<typename C::E>(point, a, w.x, w.y);
  sm80::multiply<typename C::E>(point, a, w.z, w.w);
}

template <class C, bool kBackward>
constexpr int kFrameMmaCtas = C::kBlocks > 2 || kBackward ? 2 : 3;  // of an SM

template <class C, bool kBackward>
__global__ void __launch_bounds__(C::kThreads, kFrameMmaCtas<C, kBackward>)
    frame_mma_kernel(const __grid_constant__ FrameCuda p) {
  using E = typename C::E;
  const int r = int(p.args.r), H = int(p.args.H), h = int(blockIdx.x % H);
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int chunks = (r + C::kPlanes - 1) / C::kPlanes;
  const int64_t N = p.args.B * p.args.T, first = blockIdx.x / H * p.span;
  const int64_t last = first + p.span < N ? first + p.span : N;
  extern __shared__ uint4 sFirst[];
  uint4* const sSecond = sFirst + chunks * C::kFirst * 32;
  double* const sTheta = reinterpret_cast<double*>(sSecond + chunks * C::kSecond * 32);
  const int D = int(p.args.D);
  const int64_t head = int64_t(h) * D * 2 * r;
  if (p.W_double)
    stage_fragments<C>(static_cast<const double*>(p.W) + head, D, 2 * r, chunks, sFirst, sSecond);
  else
    stage_fragments<C>(static_cast<const float*>(p.W) + head, D, 2 * r, chunks, sFirst, sSecond);
  for (int k = threadIdx.x; k < chunks * C::kPlanes; k += C::kThreads)
    sTheta[k] = k < r ? p.args.theta[int64_t(h) * r + k] : 0;
  __syncthreads();

  // backward: `turned` is the upstream gradient, and x is there for the sums; forward: x is where
  // the next step's rows arrive
  uint32_t turned[2][C::kBlocks][4], x[2][C::kBlocks][4];
  const auto load_x = [&](int64_t step) {
    const int64_t n[2] = {step + g, step + g + 8};
    load_rows<C>(p, p.args.x, n, last, h, c, x);
  };
  const int64_t begin = first + threadIdx.x / 32 * 16;
  if constexpr (!kBackward) load_x(begin);
  for (int64_t step = begin; step < last; step += C::kTokens) {
    const int64_t n[2] = {step + g, step + g + 8};
    if constexpr (kBackward) {
      load_rows<C>(p, p.args.g, n, last, h, c, turned);
      load_x(step);
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < C::kBlocks; ++j)
#pragma unroll
          for (int q = 0; q < 4; ++q) turned[i][j][q] = x[i][j][q];
      load_x(step + C::kTokens);
    }
    double t[2];
    float dt[2] = {}, y[C::kBlocks][4][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) t[i] = n[i] < last ? p.args.t[n[i]] : 0;
#pragma unroll
    for (int j = 0; j < C::kBlocks; ++j)
#pragma unroll
      for (int q = 0; q < 4; ++q)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          y[j][q][i] = value_of<E>(turned[i / 2][j][q] >> 16 * (i % 2) & 0xffff);

    for (int m = 0; m < chunks; ++m) {
      uint32_t high[4], low[4];  // of the change, as A of the second product
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        float e[4] = {}, point[4] = {};
#pragma unroll
        for (int s = 0; s < 2 * C::kBlocks; ++s) {
          const uint4 w = sFirst[((m * 2 + tile) * 2 * C::kBlocks + s) * 32 + lane];
          add_step<C>(e, turned, s, w);
          if constexpr (kBackward) add_step<C>(point, x, s, w);
        }
        const int k = m * C::kPlanes + tile * 4 + c;
        const double theta = sTheta[k];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Angle at(t[i], theta);
          const float turn = kBackward ? -at.turn() : at.turn(), less_one = at.less_one();
          const float e0 = e[2 * i], e1 = e[2 * i + 1];
          const float d0 = e0 * less_one + e1 * turn, d1 = e1 * less_one - e0 * turn;
          split<E>(d0, d1, high[2 * tile + i], low[2 * tile + i]);
          if constexpr (kBackward) {
            const float c0 = point[2 * i], c1 = point[2 * i + 1];
            dt[i] += float(theta) * ((e0 + d0) * c1 - (e1 + d1) * c0);
            if (p.coefs && k < r && n[i] < last)
              __stcg(reinterpret_cast<float4*>(p.coefs) + (n[i] * H + h) * r + k,
                     make_float4(c0, c1, e0, e1));
          }
        }
      }
#pragma unroll
      for (int j = 0; j < C::kBlocks; ++j)
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint4 w = sSecond[(m * C::kSecond + j * 4 + q) * 32 + lane];
          sm80::multiply<E>(y[j][q], high, w.x, w.y);
          sm80::multiply<E>(y[j][q], high, w.z, w.w);
          sm80::multiply<E>(y[j][q], low, w.x, w.y);
        }
    }
    store_rows<C>(p, n, last, h, c, y);
    if constexpr (kBackward)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float total = lane_sum<4>(dt[i]);
        if (p.args.dt && c == 0 && n[i] < last)
          static_cast<float*>(p.args.dt)[n[i] * H + h] = total;
      }
  }
}

template <class C, bool kBackward>
void frame_mma_kernel_launch(const FrameCuda& p, void* stream) {
  FrameCuda call = p;
  const int64_t chunks = (p.args.r + C::kPlanes - 1) / C::kPlanes;
  spread_steps(call, C::kTokens, kFrameMmaCtas<C, kBackward>, 32);
  const int bytes = int(chunks) * (C::kChunkBytes + C::kPlanes * int(sizeof(double)));
  if (bytes > 48 << 10)
    cudaFuncSetAttribute(frame_mma_kernel<C, kBackward>,
                         cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  frame_mma_kernel<C, kBackward>
      <<<call.splits * p.args.H, C::kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(call);
}

// Whether it was launched: there are tensor cores for these rows.
template <class E, bool kBackward>
bool frame_mma_launch(const FrameCuda& p, void* stream) {
  if (!p.vectors || p.args.r <= kFrameFused || p.args.D > 128) return false;
  p.args.D <= 64 ? frame_mma_kernel_launch<FrameMma<E, 2>, kBackward>(p, stream)
                 : frame_mma_kernel_launch<FrameMma<E, 4>, kBackward>(p, stream);
  return true;
}
}  // namespace df::cuda
