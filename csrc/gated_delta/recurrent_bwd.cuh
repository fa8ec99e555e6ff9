// Gradients of the gated delta rule token by token (gated_delta.md, 2.6), a scalar decay a token.
// With S~ = e^g S of the state before a token and dS the gradient of the state after it, t = T..1:
//   dS += q^ dO^T;  du = dS^T k;  dv = beta du;  dbeta = du.e;  dq = S~ dO + (u.dO) k
//   dk = dS u - S~ dv, with dS before and after:  dS -= k dv^T;  dg = <dS, S~>;  dS *= e^g
//
// CTA = (sequence, value head, V tile), up to 8 warps: fewer, with a smaller tile, while the grid
// is less than an SM each. S and dS are tiles in registers (state_tile.cuh). Three sweeps:
//   forward over the sequence; the state at every 64th token goes to memory;
//   the last segment of 64 first: forward once more, with the state of every block of 8 tokens (4
//   above K = 128) to memory, from where the caches serve it;
//   the last block first: its tokens' e and u, then each token, the last first: the state before it
//   from the block's by updates without reductions (S <- e^g S + k u^T, on average 3.5), and the
//   equations above.
// dq and dk of a token are sums over V: within a thread, over the groups of a warp by shuffles that
// leave each lane its part, over warps through shared memory (two buffers, one barrier a token);
// those over V tiles and heads are recurrent_bwd_sums.cu's. All sums over V are binary trees over
// the warps' columns, the same for every cut into tiles: no bit depends on the grid.
//
// Shared memory: 32 (2 kTileK + 4 tile + 1) bytes of a block and 16 (kTileK + 1) a warp of sums: 41
// KB at K = V = 128, at most 45 KB. Registers: 64 or 128 of states; at most 255, 8 warps an SM.
// Bytes a token and value head: q, k a V tile and sweep (from L2 beyond the first), v, dO, dv; 8 K
// of partial sums; states of 4 K V every 64 and every 8 tokens, out and in (mostly L2).
// FLOPs: about 42 K a value column, 16 K of them the gradients'. Bound by the latency of a token
// while there are few sequences and heads, else by the multiply-adds.
#pragma once
#include "common/cuda/reduce.cuh"
#include "common/cuda/sequences.cuh"
#include "gated_delta/head_gate.cuh"
#include "gated_delta/recurrent.h"
#include "gated_delta/state_tile.cuh"
#include "gated_delta/tree.cuh"

namespace df::cuda {
template <class E_, int kTileK>
struct RecurrentBwdConfig : StateTile<kTileK> {
  using E = E_;
  using Tile = StateTile<kTileK>;
  static constexpr int kBlock = kTileK > 128 ? 4 : 8, kMostWarps = RecurrentBwdLaunch::kMostWarps;
};

// A block of tokens in shared memory: rows of q, k [kTileK] and of v, then e, dO, u, beta [tile].
template <class C>
struct BwdBlock {
  float* base;
  int tile;  // warps are tile / kRowsPerWarp
  __device__ float* q(int i) const { return base + i * C::kTileK; }
  __device__ float* k(int i) const { return base + (C::kBlock + i) * C::kTileK; }
  __device__ float* row(int which, int i) const {
    return base + 2 * C::kBlock * C::kTileK + (which * C::kBlock + i) * tile;
  }
  __device__ float* e(int i) const { return row(0, i); }
  __device__ float* d_o(int i) const { return row(1, i); }
  __device__ float* u(int i) const { return row(2, i); }
  __device__ float* beta(int i) const { return row(3, i); }
  __device__ float& decay(int i) const { return row(4, 0)[i]; }
  // of one of two buffers: the warps' sums of a token, [2, kTileK] and two scalars each
  __device__ float* keys(int buffer) const {
    return row(4, 0) + C::kBlock + buffer * 2 * C::kTileK * (tile / C::kRowsPerWarp);
  }
  __device__ float* scalars(int buffer) const {
    return keys(2) + buffer * 2 * (tile / C::kRowsPerWarp);
  }
  static int floats(int tile, int warps) {
    return C::kBlock * (2 * C::kTileK + 4 * tile + 1) + 4 * warps * (C::kTileK + 1);
  }
};

struct BwdPlace {  // what a CTA works on
  int b, n, h, key_head;
  int v0, tile;
  // of the thread: its lane, its columns within the tile, and the one whose sums it has
  int lane, column, mine;
};

// Rows of the block's tokens [t0, t0 + count), normalised if asked. The first sweeps need k and v
// alone; q^ contains the scale.
template <class C>
__device__ inline void bwd_stage(const RecurrentBwdLaunch& p, const BwdPlace& at,
                                 const HeadGate& head, int64_t t0, int count, bool all,
                                 const BwdBlock<C>& to) {
  using E = typename C::E;
  const RecurrentInputs& x = p.args.x;
  const ChunkInputs& in = x.in;
  const int K = int(in.shape.K), V = int(in.shape.V), lane = threadIdx.x % 32;
  const float sigmoid_scale = float(in.pre.sigmoid_scale);
  __syncthreads();  // the block before is no longer read
  for (int i = threadIdx.x / 32; i < (all ? 2 : 1) * count; i += blockDim.x / 32) {
    const bool is_q = i >= count;
    const int token = is_q ? i - count : i;
    const Input& from = is_q ? in.q : in.k;
    const E* const row =
        static_cast<const E*>(from.data) + offset(from, at.b, t0 + token, at.key_head);
    float r[C::kTileK / 32], sum = 0;
#pragma unroll
    for (int c = 0; c < C::kTileK / 32; ++c) {
      const int k = c * 32 + lane;
      r[c] = k < K ? to_float(row[k]) : 0;
      sum += r[c] * r[c];
    }
    float factor = is_q ? float(in.scale) : 1;
    if (in.l2norm) factor *= 1.0f / sqrtf(lane_sum<32>(sum) + 1e-6f);
#pragma unroll
    for (int c = 0; c < C::kTileK / 32; ++c)
      (is_q ? to.q(token) : to.k(token))[c * 32 + lane] = r[c] * factor;
  }
  for (int i = threadIdx.x; i < count * at.tile; i += blockDim.x) {
    const int64_t t = t0 + i / at.tile;
    const int v = at.v0 + i % at.tile;
    const bool inside = v < V;
    to.e(0)[i] =
        inside ? to_float(static_cast<const E*>(in.v.data)[offset(in.v, at.b, t, at.h) + v]) : 0;
    if (all)
      to.d_o(0)[i] = inside ? load_any(p.args.d_o, offset(p.args.d_o, at.b, t, at.h) + v) : 0;
    float beta = 1;
    if (in.beta.data && inside) {
      beta = load_any(in.beta, offset(in.beta, at.b, t, at.h) + (x.beta_per_channel ? v : 0));
      if (sigmoid_scale > 0) beta = sigmoid_scale * sigmoid(beta);
    }
    to.beta(0)[i] = beta;
  }
  if (threadIdx.x < count) {
    const int64_t t = t0 + threadIdx.x;
    const float g = in.g.data ? gate(head, load_any(in.g, offset(in.g, at.b, t, at.h))) : 0;
    to.decay(threadIdx.x) = expf(clamp_gate(g));
  }
  __syncthreads();
}

// S <- e^g S + k u^T
template <class C>
__device__ inline void bwd_update(typename C::Registers& S, const float* k, float decay,
                                  const float (&u)[4]) {
#pragma unroll
  for (int n = 0; n < C::kSlice; n += 4) {
    float a[4];
    load_shared(k + C::k(0, n), a);
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll
      for (int r = 0; r < 4; ++r) S[r][n + w] = decay * S[r][n + w] + u[r] * a[w];
  }
}

// One token forward: e takes the place of v, u is kept beside it.
template <class C>
__device__ inline void bwd_forward(const BwdPlace& at, const BwdBlock<C>& block, int i,
                                   typename C::Registers& S) {
  const float* const k = block.k(i) + C::k(at.lane, 0);
  const float decay = block.decay(i);
  float read[4] = {}, u[4];
  read_columns<C>(S, [&](int n, float(&a)[4]) { load_shared(k + C::k(0, n), a); }, read);
  const float e = block.e(i)[at.mine] - decay * sum_of_row<C::kLanes>(read, at.lane);
  gather_rows(block.beta(i)[at.mine] * e, u);
  __syncwarp();  // all lanes of the column have read v
  if (at.lane < 4) block.e(i)[at.mine] = e, block.u(i)[at.mine] = block.beta(i)[at.mine] * e;
  bwd_update<C>(S, k, decay, u);
}

// This thread's part of a state, in the order of its registers.
template <class C>
__device__ inline void bwd_save(float* to, const typename C::Registers& S) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int n = 0; n < C::kSlice; n += 4)
      reinterpret_cast<float4*>(to)[(r * C::kSlice + n) / 4 * blockDim.x + threadIdx.x] =
          make_float4(S[r][n], S[r][n + 1], S[r][n + 2], S[r][n + 3]);
}
template <class C>
__device__ inline void bwd_restore(const float* from, typename C::Registers& S) {
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int n = 0; n < C::kSlice; n += 4) {
      float4 x{};
      if (from)
        x = reinterpret_cast<const float4*>(
            from)[(r * C::kSlice + n) / 4 * blockDim.x + threadIdx.x];
      S[r][n] = x.x, S[r][n + 1] = x.y, S[r][n + 2] = x.z, S[r][n + 3] = x.w;
    }
}

// Forward from t0 to end, a multiple of `each` tokens; the states after these go to `to`.
template <class C>
__device__ inline void bwd_sweep(const RecurrentBwdLaunch& p, const BwdPlace& at,
                                 const HeadGate& head, const BwdBlock<C>& block, int64_t t0,
                                 int64_t end, int64_t each, float* to, int64_t stride,
                                 typename C::Registers& S) {
  for (int64_t t = t0; t < end;) {
    bwd_stage<C>(p, at, head, t, C::kBlock, false, block);
    for (int i = 0; i < C::kBlock; ++i) bwd_forward<C>(at, block, i, S);
    t += C::kBlock;
    if ((t - t0) % each == 0) bwd_save<C>(to + ((t - t0) / each - 1) * stride, S);
  }
}

// The states that were kept: at token 64 i of the sequence, at token kBlock i of the segment, i >
// 0, and the initial one.
template <class C>
struct BwdStates {
  float *checkpoints, *starts, *origin;
  int64_t stride;
  __device__ BwdStates(const RecurrentBwdLaunch& p, const BwdPlace& at, const Span& span,
                       int64_t tiles) {
    const ChunkShape& s = p.shape();
    const int64_t floats = int64_t(at.tile) * C::kTileK;
    const int64_t own = (at.h * tiles + at.v0 / at.tile) * floats;
    stride = s.HV * tiles * floats;
    checkpoints = p.checkpoints + (at.b * (s.T / s.C) + span.first / s.C) * stride + own;
    starts = p.starts + own +
             stride * (p.few_sequences() ? at.n * p.starts_each()
                                         : at.b * (s.T / C::kBlock) + span.first / C::kBlock);
    origin = p.origins ? p.origins + at.n * stride + own : nullptr;
  }
  // before a block of a segment; null: zeros
  __device__ const float* before(int64_t segment, int64_t index) const {
    return index > 0     ? starts + (index - 1) * stride
           : segment > 0 ? checkpoints + (segment - 1) * stride
                         : origin;
  }
};

// Four elements of dq and of dk of each thread, summed over the groups of lanes of the warp, to
// their places from element n of the lanes on in `to` [2, kTileK]: the upper half of the warp adds
// up dk, and with 8 lanes a group every second one the last two elements.
template <class C>
__device__ inline void store_group_sums(const float (&dq)[4], const float (&dk)[4], int lane, int n,
                                        float* to) {
  constexpr unsigned kAll = 0xffffffffu;
  const bool upper = threadIdx.x & 16, odd = threadIdx.x & 8;
  float* const at = to + (upper ? C::kTileK : 0) + C::k(lane, n);
  if constexpr (C::kLanes == 8) {
    float sums[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float q = (odd ? dq[2 + i] : dq[i]) + __shfl_xor_sync(kAll, odd ? dq[i] : dq[2 + i], 8);
      const float k = (odd ? dk[2 + i] : dk[i]) + __shfl_xor_sync(kAll, odd ? dk[i] : dk[2 + i], 8);
      sums[i] = (upper ? k : q) + __shfl_xor_sync(kAll, upper ? q : k, 16);
    }
    *reinterpret_cast<float2*>(at + (odd ? 2 : 0)) = make_float2(sums[0], sums[1]);
  } else {
    float sums[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[i] = (upper ? dk[i] : dq[i]) + __shfl_xor_sync(kAll, upper ? dq[i] : dk[i], 16);
    *reinterpret_cast<float4*>(at) = make_float4(sums[0], sums[1], sums[2], sums[3]);
  }
}

// dv, and dbeta where it is one a channel, of the column whose sums this thread has.
template <class C>
__device__ inline void bwd_store_value(const RecurrentBwdLaunch& p, const BwdPlace& at, int64_t t,
                                       float dv, float dbeta, float beta) {
  const ChunkShape& s = p.shape();
  const int v = at.v0 + at.mine;
  if (at.lane >= 4 || v >= s.V) return;
  const int64_t place = ((at.b * s.T + t) * s.HV + at.h) * s.V + v;
  from_float(dv, static_cast<typename C::E*>(p.args.dv) + place);
  if (!p.args.x.beta_per_channel) return;
  const float m = float(p.args.x.in.pre.sigmoid_scale);
  static_cast<float*>(p.args.dbeta)[place] = m > 0 ? dbeta * beta * (1 - beta / m) : dbeta;
}

struct BwdToken {  // sums of a token that are not a row of K: <dS, S~> and du.e of the thread
  float dg, dbeta;
};

// One token backwards: S is the state before it, dS the gradient of the one after it and then of
// that before it; dq and dk of the warp go to `keys`.
template <class C>
__device__ inline BwdToken bwd_token(const RecurrentBwdLaunch& p, const BwdPlace& at,
                                     const BwdBlock<C>& block, int64_t t, int i,
                                     const typename C::Registers& S, typename C::Registers& dS,
                                     float* keys) {
  const float* const k = block.k(i) + C::k(at.lane, 0);
  const float* const q = block.q(i) + C::k(at.lane, 0);
  const float decay = block.decay(i);
  float d_o[4], u[4], du[4] = {}, dv[4];
  load_shared(block.d_o(i) + at.column, d_o);
  load_shared(block.u(i) + at.column, u);
#pragma unroll
  for (int n = 0; n < C::kSlice; n += 4) {
    float a[4], b[4];
    load_shared(q + C::k(0, n), a);
    load_shared(k + C::k(0, n), b);
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        dS[r][n + w] += a[w] * d_o[r];
        du[r] += dS[r][n + w] * b[w];
      }
  }
  const float du_own = sum_of_row<C::kLanes>(du, at.lane), dv_own = block.beta(i)[at.mine] * du_own;
  gather_rows(dv_own, dv);
  BwdToken sums{0, at.lane < 4 ? du_own * block.e(i)[at.mine] : 0};
  bwd_store_value<C>(p, at, t, dv_own, du_own * block.e(i)[at.mine], block.beta(i)[at.mine]);

  const float u_dO = u[0] * d_o[0] + u[1] * d_o[1] + u[2] * d_o[2] + u[3] * d_o[3];
#pragma unroll
  for (int n = 0; n < C::kSlice; n += 4) {
    float b[4], dq[4], dk[4] = {};
    load_shared(k + C::k(0, n), b);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      dq[w] = b[w] * u_dO;
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const float s = decay * S[r][n + w];
        dq[w] += s * d_o[r];
        dk[w] += dS[r][n + w] * u[r] - s * dv[r];
        const float d = dS[r][n + w] - b[w] * dv[r];
        sums.dg += d * s;
        dS[r][n + w] = decay * d;
      }
    }
    store_group_sums<C>(dq, dk, at.lane, n, keys);
  }
  return sums;
}

// The CTA's sums of a token, from its warps' to memory; the barrier is the token's only one.
template <class C>
__device__ inline void bwd_deliver(const RecurrentBwdLaunch& p, const BwdPlace& at,
                                   const BwdBlock<C>& block, int64_t t, int buffer, BwdToken sums) {
  const ChunkShape& s = p.shape();
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, K = int(s.K);
  float* const keys = block.keys(buffer);
  float* const scalars = block.scalars(buffer);
  sums.dg = lane_sum<32>(sums.dg), sums.dbeta = lane_sum<32>(sums.dbeta);
  if (threadIdx.x % 32 == 0) scalars[2 * warp] = sums.dg, scalars[2 * warp + 1] = sums.dbeta;
  __syncthreads();
  const int64_t token = (at.b * s.T + t) * s.HV + at.h;
  const int64_t place = at.v0 / at.tile * p.tokens() * s.HV + token;
  for (int i = threadIdx.x; i < 2 * C::kTileK; i += blockDim.x)
    if (i % C::kTileK < K)
      p.keys[(place * 2 + i / C::kTileK) * K + i % C::kTileK] =
          tree_sum<C::kMostWarps>(keys + i, 2 * C::kTileK, warps);
  if (threadIdx.x < 2)
    p.gates[(at.v0 / at.tile * 2 + threadIdx.x) * p.tokens() * s.HV + token] =
        tree_sum<C::kMostWarps>(scalars + threadIdx.x, 2, warps);
}

// The tokens behind the last sequence have no gradient.
template <class C>
__device__ inline void bwd_clear(const RecurrentBwdLaunch& p, const BwdPlace& at) {
  const ChunkShape& s = p.shape();
  for (int64_t t = offset_at(p.offsets, at.n); t < s.T; ++t)
    for (int v = at.v0 + threadIdx.x; v < s.V && v < at.v0 + at.tile; v += blockDim.x) {
      const int64_t place = (t * s.HV + at.h) * s.V + v;
      static_cast<typename C::E*>(p.args.dv)[place] = typename C::E{};
      if (p.args.x.beta_per_channel) static_cast<float*>(p.args.dbeta)[place] = 0;
    }
}

template <class C>
__global__ void __launch_bounds__(32 * C::kMostWarps, 1)
    recurrent_bwd_kernel(const __grid_constant__ RecurrentBwdLaunch p) {
  const ChunkInputs& in = p.args.x.in;
  const ChunkShape& s = in.shape;
  const int warps = blockDim.x / 32, tile = warps * C::kRowsPerWarp, V = int(s.V);
  const int tiles = (V + tile - 1) / tile, v_tile = int(blockIdx.x % tiles);
  BwdPlace at;
  at.h = int(blockIdx.x / tiles % s.HV), at.key_head = int(at.h / s.group());
  at.n = int(blockIdx.x / tiles / s.HV), at.b = p.offsets.data ? 0 : at.n;
  at.v0 = v_tile * tile, at.tile = tile;
  at.lane = threadIdx.x % C::kLanes, at.column = threadIdx.x / C::kLanes * C::kRows;
  at.mine = at.column + row_of_lane(at.lane);
  if (at.n == p.offsets.N) return bwd_clear<C>(p, at);

  extern __shared__ float4 shared[];
  const BwdBlock<C> block{reinterpret_cast<float*>(shared), tile};
  const HeadGate head = head_gate(in.pre, at.h);
  const Span span = sequence(p.offsets, at.n);
  StatePlace place{
      (at.n * s.HV + at.h) * s.K * V,
      int(s.K),
      V,
      at.lane,
      at.v0 + at.column,
      in.state_v_first,
      (in.state_v_first ? s.K : V) % 4 == 0 && on_boundary(in.initial_state.data, 16) &&
          on_boundary(p.args.d_final_state.data, 16) && on_boundary(p.args.d_initial_state, 16)};
  typename C::Registers S, dS;
  const BwdStates<C> states(p, at, span, tiles);
  const int length = int(s.C), begin = int(span.first), last = int(span.last);
  const int segments = (last - begin + length - 1) / length;
  load_state<C>(in.initial_state.data, place, S);
  if (states.origin) bwd_save<C>(states.origin, S);
  bwd_sweep<C>(p, at, head, block, begin, begin + (segments - 1) * length, length,
               states.checkpoints, states.stride, S);
  load_state<C>(p.args.d_final_state.data, place, dS);

  int buffer = 0;
  for (int segment = segments - 1; segment >= 0; --segment) {
    const int first = begin + segment * length;
    const int end = first + length < last ? first + length : last;
    const int last_block = first + (end - first - 1) / C::kBlock * C::kBlock;
    bwd_restore<C>(states.before(segment, 0), S);
    bwd_sweep<C>(p, at, head, block, first, last_block, C::kBlock, states.starts, states.stride, S);
    for (int t0 = last_block; t0 >= first; t0 -= C::kBlock) {
      const int count = end - t0 < C::kBlock ? end - t0 : C::kBlock;
      const float* const before = states.before(segment, (t0 - first) / C::kBlock);
      bwd_stage<C>(p, at, head, t0, count, true, block);
      bwd_restore<C>(before, S);
      for (int i = 0; i < count; ++i) bwd_forward<C>(at, block, i, S);
      __syncwarp();  // e and u are read by all lanes
      for (int i = count - 1; i >= 0; --i, buffer ^= 1) {
        bwd_restore<C>(before, S);
        for (int j = 0; j < i; ++j) {
          float u[4];
          load_shared(block.u(j) + at.column, u);
          bwd_update<C>(S, block.k(j) + C::k(at.lane, 0), block.decay(j), u);
        }
        float* const keys = block.keys(buffer) + threadIdx.x / 32 * 2 * C::kTileK;
        const BwdToken sums = bwd_token<C>(p, at, block, t0 + i, i, S, dS, keys);
        bwd_deliver<C>(p, at, block, t0 + i, buffer, sums);
      }
    }
  }
  if (p.args.d_initial_state) store_state<C>(p.args.d_initial_state, place, dS);
}

template <class C>
void recurrent_bwd_launch(const RecurrentBwdLaunch& p, void* stream) {
  const int64_t sequences = p.offsets.N + (p.offsets.data ? 1 : 0);
  const int64_t grid = sequences * p.shape().HV * p.tiles();
  if (grid == 0) return;
  const size_t bytes = BwdBlock<C>::floats(int(p.tile()), int(p.warps)) * sizeof(float);
  recurrent_bwd_kernel<C>
      <<<unsigned(grid), unsigned(32 * p.warps), bytes, static_cast<cudaStream_t>(stream)>>>(p);
}
template <class E>
void recurrent_bwd_dispatch(const RecurrentBwdLaunch& p, void* stream) {
  switch (p.tile_k()) {
    case 64: return recurrent_bwd_launch<RecurrentBwdConfig<E, 64>>(p, stream);
    case 128: return recurrent_bwd_launch<RecurrentBwdConfig<E, 128>>(p, stream);
    default: return recurrent_bwd_launch<RecurrentBwdConfig<E, 256>>(p, stream);
  }
}
}  // namespace df::cuda
