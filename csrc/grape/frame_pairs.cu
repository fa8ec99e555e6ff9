// What belongs to planes and pairs of planes, from the coordinates c = W^T x and e = W^T g that the
// backward pass has left, and the end of the sums over tokens:
//   M2_jk = sum_n I(theta_j - theta_k, t) X+ + I(theta_j + theta_k, t) X-   (j <= k; M2 is skew)
//   Q_jk  = sum_n e_j u_k^T + c_j v_k^T,   K = M2 - Q;    dtheta_k = sum_n t c~_k x c_k
// X+ and X- are c~_j conj(c_k) - c_j conj(c~_k) and c~_j c_k - c_j c~_k with a plane's coordinates
// as a complex number, I the number even - i odd; sines of sums come from the addition theorem.
//
// CTA: 256 threads, one head, a span of tokens, 16 x 16 pairs (fewer planes: the threads of a pair
// share its tokens and add by shuffles). A tile of 16 tokens: first its angles and coordinates,
// two planes of a token a thread, then its pairs.
// Shared memory: 12 numbers of 2 x 16 planes and 16 tokens, rows of 17: 26 KB; reads are free of
// bank conflicts. Registers: at most 128. Bytes: 16 r a token and head, once for each 16 planes;
// 32 r^2 a CTA out. FLOPs: about 110 r^2 a token and head; bound by FP32 issue from r = 4 on.
// The last kernels add the CTAs' parts in their order, in float64.
#include "common/cuda/reduce.cuh"
#include "grape/frame_device.cuh"

namespace df::cuda {
namespace {
constexpr int kPairPlanes = 16, kPairTokens = 16, kPairThreads = 256, kPadded = kPairTokens + 1;

struct PairValues {  // of a plane, [number][plane][token]
  float c0[kPairPlanes][kPadded], c1[kPairPlanes][kPadded];
  float b0[kPairPlanes][kPadded], b1[kPairPlanes][kPadded];
  float e0[kPairPlanes][kPadded], e1[kPairPlanes][kPadded];
  float u0[kPairPlanes][kPadded], u1[kPairPlanes][kPadded];
  float v0[kPairPlanes][kPadded], v1[kPairPlanes][kPadded];
  float sin[kPairPlanes][kPadded], cos[kPairPlanes][kPadded];
};

__device__ inline void stage_pairs(const FrameCuda& p, int h, int k, int plane, int64_t n,
                                   int64_t last, int token, PairValues& to) {
  const int r = int(p.args.r);
  float4 c = make_float4(0, 0, 0, 0);
  double t = 0, theta = 0;
  if (k < r && n < last) {
    c = __ldcg(reinterpret_cast<const float4*>(p.coefs) + (n * p.args.H + h) * r + k);
    t = p.args.t[n], theta = p.args.theta[int64_t(h) * r + k];
  }
  const Angle at(t, theta);
  const Outer o(at, c.x, c.y, c.z, c.w, float(t), float(theta), p.args.generator);
  const float turn = at.turn(), less_one = at.less_one();
  to.c0[plane][token] = c.x, to.c1[plane][token] = c.y;
  to.e0[plane][token] = c.z, to.e1[plane][token] = c.w;
  to.b0[plane][token] = c.z + (c.z * less_one - c.w * turn);
  to.b1[plane][token] = c.w + (c.z * turn + c.w * less_one);
  to.u0[plane][token] = o.u0, to.u1[plane][token] = o.u1;
  to.v0[plane][token] = o.v0, to.v1[plane][token] = o.v1;
  to.sin[plane][token] = at.sin, to.cos[plane][token] = at.cos;
}

// Adds a token's part of the pair (j, k): four numbers of M2, doubled, and Q's block.
__device__ inline void add_pair(const PairValues& sJ, const PairValues& sK, int j, int k, int i,
                                float t, float less, float more, bool upper, float (&sum)[8]) {
  const float cj0 = sJ.c0[j][i], cj1 = sJ.c1[j][i], ej0 = sJ.e0[j][i], ej1 = sJ.e1[j][i];
  const float u0 = sK.u0[k][i], u1 = sK.u1[k][i], v0 = sK.v0[k][i], v1 = sK.v1[k][i];
  sum[4] += ej0 * u0 + cj0 * v0, sum[5] += ej0 * u1 + cj0 * v1;
  sum[6] += ej1 * u0 + cj1 * v0, sum[7] += ej1 * u1 + cj1 * v1;
  if (!upper) return;
  const float bj0 = sJ.b0[j][i], bj1 = sJ.b1[j][i], bk0 = sK.b0[k][i], bk1 = sK.b1[k][i];
  const float ck0 = sK.c0[k][i], ck1 = sK.c1[k][i];
  const float ss = sJ.sin[j][i] * sK.sin[k][i], cc = sJ.cos[j][i] * sK.cos[k][i];
  const float sc = sJ.sin[j][i] * sK.cos[k][i], cs = sJ.cos[j][i] * sK.sin[k][i];
  const Integral I(sc - cs, cc + ss, t, less), J(sc + cs, cc - ss, t, more);
  const float p0 = bj0 * ck0 + bj1 * ck1 - cj0 * bk0 - cj1 * bk1;
  const float p1 = bj1 * ck0 - bj0 * ck1 - cj1 * bk0 + cj0 * bk1;
  const float q0 = bj0 * ck0 - bj1 * ck1 - cj0 * bk0 + cj1 * bk1;
  const float q1 = bj0 * ck1 + bj1 * ck0 - cj0 * bk1 - cj1 * bk0;
  sum[0] += I.even * p0 + I.odd * p1, sum[1] += I.even * p1 - I.odd * p0;
  sum[2] += J.even * q0 + J.odd * q1, sum[3] += J.even * q1 - J.odd * q0;
}

__global__ void __launch_bounds__(kPairThreads)
    frame_pairs_kernel(const __grid_constant__ FrameCuda p) {
  __shared__ PairValues sJ, sK;
  __shared__ float sT[kPairTokens];
  const int r = int(p.args.r), H = int(p.args.H), blocks = (r + kPairPlanes - 1) / kPairPlanes;
  const bool generator = p.args.generator;
  const int h = int(blockIdx.x % H),
            block = int(blockIdx.x / H % (generator ? blocks * blocks : blocks));
  const int64_t split = blockIdx.x / H / (generator ? blocks * blocks : blocks);
  const int j0 = (generator ? block / blocks : block) * kPairPlanes;
  const int k0 = (generator ? block % blocks : block) * kPairPlanes;
  const int rows = r - j0 < kPairPlanes ? r - j0 : kPairPlanes;
  const int columns = r - k0 < kPairPlanes ? r - k0 : kPairPlanes;
  const int pairs = generator ? rows * columns : rows;
  int share = kPairTokens;  // threads of a pair
  while (share * pairs > kPairThreads) share /= 2;
  const int pair = threadIdx.x / share, j = generator ? pair / columns : pair;
  const int k = generator ? pair % columns : pair;
  const bool active = pair < pairs, upper = j0 + j <= k0 + k;
  const double* const theta = p.args.theta + int64_t(h) * r;
  const double theta_j = active ? theta[j0 + j] : 0, theta_k = active ? theta[k0 + k] : 0;
  const float less = float(theta_j - theta_k), more = float(theta_j + theta_k);
  const int64_t N = p.args.B * p.args.T, first = split * p.pair_span;
  const int64_t last = first + p.pair_span < N ? first + p.pair_span : N;
  const int token = threadIdx.x % kPairTokens, plane = threadIdx.x / kPairTokens;
  float sum[8] = {};
  for (int64_t step = first; step < last; step += kPairTokens) {
    __syncthreads();
    stage_pairs(p, h, j0 + plane, plane, step + token, last, token, sJ);
    stage_pairs(p, h, k0 + plane, plane, step + token, last, token, sK);
    if (threadIdx.x < kPairTokens)
      sT[threadIdx.x] = step + threadIdx.x < last ? float(p.args.t[step + threadIdx.x]) : 0;
    __syncthreads();
    if (!active) continue;
    for (int i = threadIdx.x % share; i < kPairTokens; i += share) {
      if (generator)
        add_pair(sJ, sK, j, k, i, sT[i], less, more, upper, sum);
      else
        sum[0] += sT[i] * (sJ.b0[j][i] * sJ.c1[j][i] - sJ.b1[j][i] * sJ.c0[j][i]);
    }
  }
#pragma unroll
  for (int c = 0; c < 8; ++c)
    for (int mask = 1; mask < share; mask *= 2)
      sum[c] += __shfl_xor_sync(0xffffffffu, sum[c], mask);
  if (!active || threadIdx.x % share) return;
  if (!generator) {
    p.pairs[(split * H + h) * r + j0 + j] = sum[0];
    return;
  }
  float4* const to =
      reinterpret_cast<float4*>(p.pairs) + (((split * H + h) * r + j0 + j) * r + k0 + k) * 2;
  to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
  to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
}

// Columns of [splits, columns], added in their order.
__global__ void frame_sum_kernel(const float* parts, int64_t splits, int64_t columns, float* to) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= columns) return;
  double total = 0;
  for (int64_t s = 0; s < splits; ++s) total += parts[s * columns + i];
  to[i] = float(total);
}

// K [H, 2 r, 2 r], a thread for each pair of planes.
__global__ void frame_skew_kernel(const __grid_constant__ FrameCuda p) {
  const int64_t r = p.args.r, all = p.args.H * r * r;
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= all) return;
  const int64_t h = i / (r * r), j = i / r % r, k = i % r;
  const bool upper = j <= k;
  const int64_t twin = upper ? i : (h * r + k) * r + j;
  double m[4] = {}, q[4] = {};
  for (int64_t s = 0; s < p.pair_splits; ++s) {
    const float *from = p.pairs + (s * all + twin) * 8, *own = p.pairs + (s * all + i) * 8 + 4;
#pragma unroll
    for (int c = 0; c < 4; ++c) m[c] += from[c], q[c] += own[c];
  }
  double M[2][2] = {{m[0] + m[2], m[3] - m[1]}, {m[1] + m[3], m[0] - m[2]}};
#pragma unroll
  for (int u = 0; u < 2; ++u)
#pragma unroll
    for (int v = 0; v < 2; ++v)
      p.K[(h * 2 * r + 2 * j + u) * 2 * r + 2 * k + v] =
          float((upper ? M[u][v] : -M[v][u]) / 2 - q[2 * u + v]);
}

void add_parts(const float* parts, int64_t splits, int64_t columns, float* to, void* stream) {
  if (columns)
    frame_sum_kernel<<<(columns + 255) / 256, 256, 0, static_cast<cudaStream_t>(stream)>>>(
        parts, splits, columns, to);
}
}  // namespace
}  // namespace df::cuda

namespace df {
void frame_pairs_cuda(const FrameCuda& p, void* stream) {
  using namespace cuda;
  const int64_t blocks = (p.args.r + kPairPlanes - 1) / kPairPlanes;
  const int64_t grid = p.pair_splits * p.args.H * (p.args.generator ? blocks * blocks : blocks);
  frame_pairs_kernel<<<grid, kPairThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
}

void frame_finish_cuda(const FrameCuda& p, void* stream) {
  using namespace cuda;
  const int64_t H = p.args.H, r = p.args.r;
  if (!p.W) return add_parts(p.products, p.splits, H * r, p.dtheta, stream);
  add_parts(p.products, p.splits, H * 2 * r * p.args.D, p.dW, stream);
  if (!p.args.generator) return add_parts(p.pairs, p.pair_splits, H * r, p.dtheta, stream);
  frame_skew_kernel<<<(H * r * r + 127) / 128, 128, 0, static_cast<cudaStream_t>(stream)>>>(p);
}
}  // namespace df
