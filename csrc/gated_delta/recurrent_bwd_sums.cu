// From the partial results of recurrent_bwd.cuh, float, to the gradients: sums over V tiles (binary
// trees) and over the value heads of a group (in their order), then backwards through what was
// fused:
//   l2norm  dx = r (dx^ - x^ (x^ . dx^)), x^ = r x;  q^ has its gradient scaled first
//   gate    da = dg rate sigmoid(a'), dA_log = sum dg g, ddt_bias = sum da; zero where g < -88
//   sigmoid db = dbeta beta (1 - beta / m)
// Tokens behind the last sequence get zeros.
//
// recurrent_keys_kernel: a warp a token and key head, elements 32 apart in its lanes; 8 warps a
// CTA. recurrent_gates_kernel: CTA = (256 tokens, 256 value heads), a head in each thread, which
// walks down the tokens and sums for A_log and dt_bias; rows of threads are added through shared
// memory (2 KB) in a fixed order, column_sums adds the CTAs' results in double. Registers: at
// most 64. Bytes a token: 8 K tiles HV of partial sums in, 2 e K H of q and k in if they were
// normalised, 2 e K H out. FLOPs: about one a byte. Bound by memory.
#include "common/cuda/reduce.cuh"
#include "common/cuda/sequences.cuh"
#include "gated_delta/gate_sums.cuh"
#include "gated_delta/head_gate.cuh"
#include "gated_delta/recurrent.h"
#include "gated_delta/tree.cuh"

namespace df::cuda {
constexpr int kKeyThreads = 256, kKeyParts = 8, kMostTiles = 32;

// d, the gradient of a normalised row, becomes that of the row and is stored.
__device__ inline void store_key(const Input& x, int64_t b, int64_t t, int64_t h, int K,
                                 bool l2norm, float (&d)[kKeyParts], void* to, int64_t place) {
  const int lane = threadIdx.x % 32;
  float row[kKeyParts], sum = 0, along = 0, r = 1;
  if (l2norm) {
    const int64_t from = offset(x, b, t, h);
#pragma unroll
    for (int c = 0; c < kKeyParts; ++c) {
      row[c] = c * 32 + lane < K ? load_any(x, from + c * 32 + lane) : 0;
      sum += row[c] * row[c];
    }
    r = 1.0f / sqrtf(lane_sum<32>(sum) + 1e-6f);
#pragma unroll
    for (int c = 0; c < kKeyParts; ++c) along += row[c] * r * d[c];
    along = lane_sum<32>(along);
#pragma unroll
    for (int c = 0; c < kKeyParts; ++c) d[c] = r * (d[c] - row[c] * r * along);
  }
#pragma unroll
  for (int c = 0; c < kKeyParts; ++c)
    if (c * 32 + lane < K) store_any(d[c], to, x.dtype, place + c * 32 + lane);
}

__global__ void __launch_bounds__(kKeyThreads, 2)
    recurrent_keys_kernel(const __grid_constant__ RecurrentBwdLaunch p) {
  const ChunkInputs& in = p.args.x.in;
  const ChunkShape& s = in.shape;
  const int64_t index = int64_t(blockIdx.x) * (kKeyThreads / 32) + threadIdx.x / 32;
  if (index >= p.tokens() * s.H) return;
  const int64_t token = index / s.H, h = index % s.H, b = token / s.T, t = token % s.T;
  const int K = int(s.K), lane = threadIdx.x % 32, tiles = int(p.tiles());
  const bool inside = span_of(p.offsets, b, t).n < p.offsets.N;
  const int64_t stride = p.tokens() * s.HV * 2 * K;  // from tile to tile
  float dq[kKeyParts] = {}, dk[kKeyParts] = {};
  for (int64_t g = 0; g < s.group() && inside; ++g) {
    const float* const from = p.keys + (token * s.HV + h * s.group() + g) * 2 * K + lane;
#pragma unroll
    for (int c = 0; c < kKeyParts; ++c)
      if (c * 32 + lane < K) {
        dq[c] += tree_sum<kMostTiles>(from + c * 32, stride, tiles);
        dk[c] += tree_sum<kMostTiles>(from + K + c * 32, stride, tiles);
      }
  }
#pragma unroll
  for (int c = 0; c < kKeyParts; ++c) dq[c] *= float(in.scale);
  store_key(in.q, b, t, h, K, in.l2norm && inside, dq, p.args.dq, index * K);
  store_key(in.k, b, t, h, K, in.l2norm && inside, dk, p.args.dk, index * K);
}

struct GateGradient {
  float dg, sums[2];  // of A_log, of dt_bias
};
__device__ inline GateGradient gate_gradient(const HeadGate& head, float raw, float dg) {
  const float g = gate(head, raw);
  if (g < -88) return {0, {0, 0}};
  if (!head.fused) return {dg, {0, 0}};
  const float da = dg * head.rate * sigmoid(raw + head.bias);
  return {da, {dg * g, da}};
}

__global__ void __launch_bounds__(RecurrentBwdLaunch::kSumThreads)
    recurrent_gates_kernel(const __grid_constant__ RecurrentBwdLaunch p) {
  constexpr int kThreads = RecurrentBwdLaunch::kSumThreads;
  __shared__ float shared[2][kThreads];
  const RecurrentInputs& x = p.args.x;
  const ChunkShape& s = x.in.shape;
  const int block = s.HV < kThreads ? int(s.HV) : kThreads, rows = kThreads / block;
  const int64_t blocks = (s.HV + block - 1) / block, cta = blockIdx.x / blocks;
  const int64_t h = blockIdx.x % blocks * block + threadIdx.x % block;
  const int64_t first = cta * p.kSumTokens, tokens = p.tokens();
  const int64_t last = first + p.kSumTokens < tokens ? first + p.kSumTokens : tokens;
  const bool mine = threadIdx.x < rows * block && h < s.HV;
  const HeadGate head = mine ? head_gate(x.in.pre, h) : HeadGate{};
  const float m = float(x.in.pre.sigmoid_scale);
  float sums[2] = {};
  for (int64_t i = first + threadIdx.x / block; i < last && mine; i += rows) {
    const int64_t b = i / s.T, t = i % s.T, place = i * s.HV + h;
    const bool inside = span_of(p.offsets, b, t).n < p.offsets.N;
    const auto total = [&](int which) {
      return inside ? tree_sum<kMostTiles>(p.gates + which * tokens * s.HV + place,
                                           tokens * s.HV * 2, int(p.tiles()))
                    : 0;
    };
    if (p.args.dg) {
      GateGradient d{0, {0, 0}};
      if (inside) d = gate_gradient(head, load_any(x.in.g, offset(x.in.g, b, t, h)), total(0));
      sums[0] += d.sums[0], sums[1] += d.sums[1];
      static_cast<float*>(p.args.dg)[place] = d.dg;
    }
    if (p.args.dbeta && !x.beta_per_channel) {
      float d = total(1);
      if (m > 0) {
        const float beta = m * sigmoid(load_any(x.in.beta, offset(x.in.beta, b, t, h)));
        d = inside ? d * beta * (1 - beta / m) : 0;
      }
      static_cast<float*>(p.args.dbeta)[place] = d;
    }
  }
  if (!p.sums) return;
  shared[0][threadIdx.x] = sums[0], shared[1][threadIdx.x] = sums[1];
  __syncthreads();
  if (threadIdx.x >= block || !mine) return;
  for (int i = 0; i < 2; ++i) {
    float sum = 0;
    for (int r = 0; r < rows; ++r) sum += shared[i][r * block + threadIdx.x];
    p.sums[(cta * 2 + i) * s.HV + h] = sum;
  }
}
}  // namespace df::cuda

void df::recurrent_bwd_sums_cuda(const RecurrentBwdLaunch& p, void* stream_) {
  const auto stream = static_cast<cudaStream_t>(stream_);
  const ChunkShape& s = p.shape();
  const ChunkInputs& in = p.args.x.in;
  if (p.tokens() != 0) {
    const int64_t warps = p.tokens() * s.H, each = cuda::kKeyThreads / 32;
    cuda::recurrent_keys_kernel<<<unsigned((warps + each - 1) / each), cuda::kKeyThreads, 0,
                                  stream>>>(p);
    const int64_t blocks = (s.HV + p.kSumThreads - 1) / p.kSumThreads;
    cuda::recurrent_gates_kernel<<<unsigned(p.sum_rows() * blocks), unsigned(p.kSumThreads), 0,
                                   stream>>>(p);
  }
  if (p.dA_log)
    cuda::column_sums(
        p.sums, p.sum_rows(), 2 * s.HV,
        cuda::GateSums{s.HV, p.dA_log, p.ddt_bias, in.pre.A_log.dtype, in.pre.dt_bias.dtype},
        stream);
}
