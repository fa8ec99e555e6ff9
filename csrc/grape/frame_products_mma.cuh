// Sums of the backward pass for more than kFrameFused planes and rows of bfloat16, D <= 128, on
// tensor cores, after frame_mma.cuh has left c and e of every plane:
//   dW^T (or P^T) [2 r, D] = sum_n u_n g_n^T + v_n x_n^T
// as products A B of m16n8k16 with coordinates of planes as rows, channels as columns and tokens
// as K. u and v go as high and low parts, so that their rounding is 2^-17. float16 has too small a
// range for them: u grows with t, and v is as small as a gradient.
//
// CTA: 4 warps, one head, a span of tokens, up to kGroup chunks of 8 planes (16 rows of A); more
// planes are other CTAs, which read x and g again. A tile of 32 tokens: rows of x and g to shared
// memory by 128-bit accesses; u and v of two tokens and a plane a thread, as fragments of A; then
// each warp multiplies its quarter of the channels, B by transposing ldmatrix.
// Shared memory: rows of D + 8 elements, 2 x 32 of them (17 KB for D = 128), fragments of A 4 KB a
// chunk of planes; no bank conflicts but in the stores of A (2-way). Registers: 16 of sums a chunk.
// Bytes: 4 D of x and g, 16 r of c and e a token and head. FLOPs: 16 r D on tensor cores, about
// 90 instructions a plane for u and v. Bound by memory up to r = 16.
#pragma once
#include "grape/frame_mma.cuh"

namespace df::cuda {
template <class E_, int kBlocks_, int kGroup_>
struct ProductsMma {  // 32 kBlocks channels, up to 8 kGroup planes
  using E = E_;
  static constexpr int kBlocks = kBlocks_, kGroup = kGroup_, kThreads = 128, kTokens = 32;
  static constexpr int kStride = 32 * kBlocks + 8;  // elements from row to row
  static constexpr int kTiles = kBlocks;            // of 8 channels a warp
  struct alignas(16) Shared {
    uint16_t rows[2][kTokens][kStride];  // g and x
    uint32_t A[kGroup][2][2][2][4][32];  // [chunk][16 tokens][u, v][high, low][register][lane]
  };
};

// Two 8 x 8 blocks of 16 bits, transposed: tokens 0-7 and 8-15 at `row`, given by lanes 0-15.
__device__ inline void load_transposed(const uint16_t* row, uint32_t& b0, uint32_t& b1) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(b0), "=r"(b1)
               : "r"(address));
}

template <class C>
__device__ inline void stage_rows(const FrameCuda& p, int h, int64_t step, int64_t last,
                                  typename C::Shared& s) {
  constexpr int kVectors = 4 * C::kBlocks;  // of a row
  const int D = int(p.args.D);
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    const FrameRows& rows = which ? p.args.x : p.args.g;
    for (int i = threadIdx.x; i < C::kTokens * kVectors; i += C::kThreads) {
      const int token = i / kVectors, d = i % kVectors * 8;
      const int64_t n = step + token;
      uint4 raw = make_uint4(0, 0, 0, 0);
      if (n < last && d < D)
        raw = __ldcg(reinterpret_cast<const uint4*>(static_cast<const typename C::E*>(rows.data) +
                                                    row_of(p.args, rows, n, h) + d));
      *reinterpret_cast<uint4*>(&s.rows[which][token][d]) = raw;
    }
  }
}

// u and v of a plane for tokens 2 i and 2 i + 1 of the tile.
template <class C>
__device__ inline void stage_outer(const FrameCuda& p, int h, int k0, int64_t step, int64_t last,
                                   typename C::Shared& s) {
  const int r = int(p.args.r);
  for (int item = threadIdx.x; item < C::kGroup * 8 * C::kTokens / 2; item += C::kThreads) {
    const int plane = item % (C::kGroup * 8), i = item / (C::kGroup * 8), k = k0 + plane;
    float u[2][2] = {}, v[2][2] = {};  // [coordinate][token]
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const int64_t n = step + 2 * i + w;
      if (n >= last || k >= r) continue;
      const float4 c =
          __ldcg(reinterpret_cast<const float4*>(p.coefs) + (n * p.args.H + h) * r + k);
      const double t = p.args.t[n], theta = p.args.theta[int64_t(h) * r + k];
      const Outer o(Angle(t, theta), c.x, c.y, c.z, c.w, float(t), float(theta), p.args.generator);
      u[0][w] = o.u0, u[1][w] = o.u1, v[0][w] = o.v0, v[1][w] = o.v1;
    }
    auto& to = s.A[plane / 8][i / 8];
#pragma unroll
    for (int coordinate = 0; coordinate < 2; ++coordinate) {
      const int row = plane % 8 * 2 + coordinate, lane = row % 8 * 4 + i % 4;
      const int reg = row / 8 + i % 8 / 4 * 2;
      split<typename C::E>(u[coordinate][0], u[coordinate][1], to[0][0][reg][lane],
                           to[0][1][reg][lane]);
      split<typename C::E>(v[coordinate][0], v[coordinate][1], to[1][0][reg][lane],
                           to[1][1][reg][lane]);
    }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 3)
    frame_products_mma_kernel(const __grid_constant__ FrameCuda p) {
  __shared__ typename C::Shared s;
  const int D = int(p.args.D), r = int(p.args.r), H = int(p.args.H), h = int(blockIdx.x % H);
  const int groups = (r + 8 * C::kGroup - 1) / (8 * C::kGroup);
  const int k0 = int(blockIdx.x / H % groups) * 8 * C::kGroup;
  const int64_t split = blockIdx.x / H / groups, N = p.args.B * p.args.T;
  const int64_t first = split * p.span, last = first + p.span < N ? first + p.span : N;
  const int lane = threadIdx.x % 32, channels = threadIdx.x / 32 * 8 * C::kTiles;
  float sum[C::kGroup][C::kTiles][4] = {};
  for (int64_t step = first; step < last; step += C::kTokens) {
    __syncthreads();
    stage_rows<C>(p, h, step, last, s);
    stage_outer<C>(p, h, k0, step, last, s);
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        uint32_t b[C::kTiles][2];
#pragma unroll
        for (int q = 0; q < C::kTiles; ++q)
          load_transposed(&s.rows[which][16 * half + lane % 16][channels + 8 * q], b[q][0],
                          b[q][1]);
#pragma unroll
        for (int m = 0; m < C::kGroup; ++m)
#pragma unroll
          for (int part = 0; part < 2; ++part) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = s.A[m][half][which][part][i][lane];
#pragma unroll
            for (int q = 0; q < C::kTiles; ++q)
              sm80::multiply<typename C::E>(sum[m][q], a, b[q][0], b[q][1]);
          }
      }
  }
  float* const to = p.products + (split * H + h) * 2 * r * D;
#pragma unroll
  for (int m = 0; m < C::kGroup; ++m)
#pragma unroll
    for (int q = 0; q < C::kTiles; ++q)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = 2 * k0 + 16 * m + 8 * i + lane / 4, d = channels + 8 * q + lane % 4 * 2;
        if (row < 2 * r && d < D)
          *reinterpret_cast<float2*>(to + row * D + d) =
              make_float2(sum[m][q][2 * i], sum[m][q][2 * i + 1]);
      }
}

template <int kBlocks, int kGroup>
void frame_products_mma_kernel_launch(const FrameCuda& p, void* stream) {
  using C = ProductsMma<bf16, kBlocks, kGroup>;
  const int64_t groups = (p.args.r + 8 * kGroup - 1) / (8 * kGroup);
  frame_products_mma_kernel<C>
      <<<p.splits * groups * p.args.H, C::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
}

// For bfloat16 rows that frame_mma_launch takes.
inline void frame_products_mma_launch(const FrameCuda& p, void* stream) {
  if (p.args.D <= 64)
    p.args.r <= 8 ? frame_products_mma_kernel_launch<2, 1>(p, stream)
                  : frame_products_mma_kernel_launch<2, 4>(p, stream);
  else
    p.args.r <= 8 ? frame_products_mma_kernel_launch<4, 1>(p, stream)
                  : frame_products_mma_kernel_launch<4, 4>(p, stream);
}
}  // namespace df::cuda
