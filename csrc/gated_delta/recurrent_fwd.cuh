// Gated delta rule token by token (gated_delta.md, 2.1), whole sequences:
//   S~ = D S;  u = beta (v - S~^T k^);  S = S~ + k^ u^T;  o = S^T q^
// D is e^g, or with decay channels (kChannels) e^g e^gv a column and e^gk a row; there beta may be
// one a column, too. k^ = k / |k| and q^ = scale q / |q| if asked.
//
// CTA = (sequence, value head, V tile), 32 to 128 threads: fewer, with a smaller tile, while the
// grid would not give every SM two CTAs. S stays in registers over all tokens: 8 lanes (16 above
// K = 128) share the K of 4 value columns (state_tile.cuh), 16 (8) columns a warp.
// Tokens come in blocks of 2 a warp (1 with channels above K = 128): the raw rows of the next block
// are requested into registers before a block is computed, and go to the other of two buffers in
// shared memory, normalised and as float, after it. One barrier a block.
// Shared memory: 8 tokens (2 kTileK + tile + 4) bytes, with channels 8 tokens (3 kTileK + 3 tile +
// 4): 21 KB at K = 128 and 4 warps, at most 37 KB. Reads are 128 bits, without bank conflicts.
// Registers: 32 to 64 of state, 8 to 32 of requested rows; at most 168, 3 CTAs of 4 warps an SM.
// Bytes a token: q and k once a V tile (from L2 beyond the first), v and o once. Sums over K: 5 or
// 6 shuffles for four columns. FLOPs: 7 K a value column. Bound by the latency of a token (two
// reductions over lanes) while there are few sequences and heads, else by the multiply-adds.
#pragma once
#include "common/cuda/reduce.cuh"
#include "common/cuda/sequences.cuh"
#include "gated_delta/head_gate.cuh"
#include "gated_delta/recurrent.h"
#include "gated_delta/state_tile.cuh"

namespace df::cuda {
template <class E_, int kTileK, bool kChannels_>
struct RecurrentConfig : StateTile<kTileK> {
  using E = E_;
  using Tile = StateTile<kTileK>;
  static constexpr bool kChannels = kChannels_;
  static constexpr int kMaxWarps = 4, kMaxThreads = 32 * kMaxWarps;
  static constexpr int kTokens = kChannels && kTileK > 128 ? 1 : 2;  // of a block, a warp
  static constexpr int kParts = kTileK / 32;                         // elements of a row, a lane
  static constexpr int kValues = (kTokens * kMaxWarps * Tile::kRowsPerWarp + 31) / 32;
};

struct RecurrentPlace {  // what a CTA works on
  int64_t b, h, key_head;
  int v0, tile, tokens;
};

// A block of tokens in shared memory.
template <class C>
struct RecurrentBuffer {
  float *q, *k, *v, *gate, *rows, *decay, *beta;  // the last three with channels
  __device__ RecurrentBuffer(float* at, int tokens, int tile) {
    q = at, k = q + tokens * C::kTileK, v = k + tokens * C::kTileK;
    if (C::kChannels) rows = v + tokens * tile, decay = rows + tokens * C::kTileK;
    if (C::kChannels) beta = decay + tokens * tile;
    gate = (C::kChannels ? beta : v) + tokens * tile;
  }
  static __host__ __device__ int floats(int tokens, int tile) {
    return tokens * ((C::kChannels ? 3 * C::kTileK + 3 * tile : 2 * C::kTileK + tile) + 4);
  }
};

// The raw elements of a block that a thread has requested.
template <class C>
struct RecurrentRequest {
  typename C::E keys[2 * C::kTokens][C::kParts], values[C::kValues];
  uint32_t g, beta;

  // of tokens [t0, end); a warp has kTokens of them, q and k
  __device__ void issue(const RecurrentInputs& x, const RecurrentPlace& at, int64_t t0,
                        int64_t end) {
    using E = typename C::E;
    const ChunkInputs& in = x.in;
    const int K = int(in.shape.K), V = int(in.shape.V), lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * C::kTokens; ++i) {
      const int64_t t = t0 + threadIdx.x / 32 * C::kTokens + i / 2;
      const Input& from = i % 2 ? in.k : in.q;
      const E* const row = static_cast<const E*>(from.data) + offset(from, at.b, t, at.key_head);
#pragma unroll
      for (int c = 0; c < C::kParts; ++c) {
        const int k = c * 32 + lane;
        keys[i][c] = t < end && k < K ? row[k] : E{};
      }
    }
#pragma unroll
    for (int i = 0; i < C::kValues; ++i) {
      const int place = i * blockDim.x + threadIdx.x, v = at.v0 + place % at.tile;
      const int64_t t = t0 + place / at.tile;
      values[i] = place < at.tokens * at.tile && t < end && v < V
                      ? static_cast<const E*>(in.v.data)[offset(in.v, at.b, t, at.h) + v]
                      : E{};
    }
    const int64_t t = t0 + threadIdx.x;
    const bool gates = threadIdx.x < at.tokens && t < end;
    g = gates && in.g.data ? load_bits(in.g, offset(in.g, at.b, t, at.h)) : 0;
    beta = gates && in.beta.data && !x.beta_per_channel
               ? load_bits(in.beta, offset(in.beta, at.b, t, at.h))
               : 0;
  }

  __device__ void store_gate(const RecurrentInputs& x, const HeadGate& head,
                             const RecurrentBuffer<C>& to) const {
    const ChunkInputs& in = x.in;
    const float scale = float(in.pre.sigmoid_scale);
    const float log_decay = in.g.data ? gate(head, to_float(g, in.g.dtype)) : 0;
    float b = 1;
    if (in.beta.data && !x.beta_per_channel) {
      b = to_float(beta, in.beta.dtype);
      if (scale > 0) b = scale * sigmoid(b);
    }
    to.gate[2 * threadIdx.x] = expf(clamp_gate(log_decay));
    to.gate[2 * threadIdx.x + 1] = b;
  }

  __device__ void store(const RecurrentInputs& x, const RecurrentPlace& at, const HeadGate& head,
                        const RecurrentBuffer<C>& to) const {
    const int lane = threadIdx.x % 32;
    float sums[2 * C::kTokens] = {};  // their shuffles run side by side
#pragma unroll
    for (int i = 0; i < 2 * C::kTokens; ++i) {
#pragma unroll
      for (int c = 0; c < C::kParts; ++c) sums[i] += to_float(keys[i][c]) * to_float(keys[i][c]);
      sums[i] = lane_sum<32>(sums[i]);
    }
#pragma unroll
    for (int i = 0; i < 2 * C::kTokens; ++i) {
      const int token = threadIdx.x / 32 * C::kTokens + i / 2;
      const float norm = x.in.l2norm ? rsqrtf(sums[i] + 1e-6f) : 1;
      const float factor = i % 2 ? norm : norm * float(x.in.scale);
#pragma unroll
      for (int c = 0; c < C::kParts; ++c)
        (i % 2 ? to.k : to.q)[token * C::kTileK + c * 32 + lane] = to_float(keys[i][c]) * factor;
    }
#pragma unroll
    for (int i = 0; i < C::kValues; ++i) {
      const int place = i * blockDim.x + threadIdx.x;
      if (place < at.tokens * at.tile) to.v[place] = to_float(values[i]);
    }
    if (threadIdx.x < at.tokens) store_gate(x, head, to);
  }
};

// Decays and write strengths a channel; their loads are not hidden.
template <class C>
__device__ inline void store_channels(const RecurrentInputs& x, const RecurrentPlace& at,
                                      int64_t t0, int64_t end, const RecurrentBuffer<C>& to) {
  const int K = int(x.in.shape.K), V = int(x.in.shape.V);
  const float scale = float(x.in.pre.sigmoid_scale);
  for (int i = threadIdx.x; i < at.tokens * C::kTileK; i += blockDim.x) {
    const int64_t t = t0 + i / C::kTileK;
    const int k = i % C::kTileK;
    const bool given = x.gk.data && t < end && k < K;
    to.rows[i] = given ? expf(clamp_gate(load_any(x.gk, offset(x.gk, at.b, t, at.h) + k))) : 1;
  }
  for (int i = threadIdx.x; i < at.tokens * at.tile; i += blockDim.x) {
    const int64_t t = t0 + i / at.tile;
    const int v = at.v0 + i % at.tile;
    const bool inside = t < end && v < V;
    to.decay[i] =
        x.gv.data && inside ? expf(clamp_gate(load_any(x.gv, offset(x.gv, at.b, t, at.h) + v))) : 1;
    float b = 1;
    if (x.beta_per_channel && inside) {
      b = load_any(x.in.beta, offset(x.in.beta, at.b, t, at.h) + v);
      if (scale > 0) b = scale * sigmoid(b);
    }
    to.beta[i] = b;
  }
}

// S <- D S + k u^T and x[r] += S[r] q.
template <class C>
__device__ inline void update(typename C::Registers& S, const float* k, const float* q,
                              const float* rows, const float (&decay)[4], const float (&u)[4],
                              float (&x)[4]) {
#pragma unroll
  for (int n = 0; n < C::kSlice; n += 4) {
    float a[4], b[4], d[4] = {1, 1, 1, 1};
    load_shared(k + C::k(0, n), a);
    load_shared(q + C::k(0, n), b);
    if constexpr (C::kChannels) load_shared(rows + C::k(0, n), d);
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        S[r][n + w] = (C::kChannels ? decay[r] * d[w] : decay[r]) * S[r][n + w] + u[r] * a[w];
        x[r] += S[r][n + w] * b[w];
      }
  }
}

template <class C>
__global__ void __launch_bounds__(C::kMaxThreads)
    recurrent_fwd_kernel(const __grid_constant__ RecurrentFwdArgs p,
                         const __grid_constant__ Offsets offsets) {
  using E = typename C::E;
  const ChunkInputs& in = p.x.in;
  const ChunkShape& s = in.shape;
  const int warps = blockDim.x / 32, tile = warps * C::kRowsPerWarp;
  const int V = int(s.V), tiles = (V + tile - 1) / tile;
  const int64_t n = blockIdx.x / tiles / s.HV;
  RecurrentPlace at;
  at.h = blockIdx.x / tiles % s.HV, at.key_head = at.h / s.group(), at.b = offsets.data ? 0 : n;
  at.v0 = int(blockIdx.x % tiles) * tile, at.tile = tile, at.tokens = warps * C::kTokens;
  E* const o = static_cast<E*>(p.o) + at.b * s.T * s.HV * V + at.h * V;

  if (n == offsets.N) {  // the tokens behind the last sequence
    for (int64_t t = offset_at(offsets, n); t < s.T; ++t)
      for (int v = at.v0 + threadIdx.x; v < V && v < at.v0 + tile; v += blockDim.x)
        o[t * s.HV * V + v] = E{};
    return;
  }
  const Span span = sequence(offsets, n);
  const int lane = threadIdx.x % C::kLanes;
  const int column = threadIdx.x / C::kLanes * C::kRows, mine = column + row_of_lane(lane);
  const StatePlace place{(n * s.HV + at.h) * s.K * V,
                         int(s.K),
                         V,
                         lane,
                         at.v0 + column,
                         in.state_v_first,
                         (in.state_v_first ? s.K : V) % 4 == 0 &&
                             on_boundary(in.initial_state.data, 16) &&
                             on_boundary(p.final_state, 16)};
  typename C::Registers S;
  load_state<C>(in.initial_state.data, place, S);

  extern __shared__ float4 shared[];
  const int floats = RecurrentBuffer<C>::floats(at.tokens, tile);
  const HeadGate head = head_gate(in.pre, at.h);
  RecurrentRequest<C> request;
  const auto deliver = [&](int64_t t0, int buffer) {
    const RecurrentBuffer<C> to(reinterpret_cast<float*>(shared) + buffer * floats, at.tokens,
                                tile);
    request.store(p.x, at, head, to);
    if constexpr (C::kChannels) store_channels<C>(p.x, at, t0, span.last, to);
  };
  if (span.first < span.last) {
    request.issue(p.x, at, span.first, span.last);
    deliver(span.first, 0);
  }
  int buffer = 0;
  for (int64_t t0 = span.first; t0 < span.last; t0 += at.tokens, buffer ^= 1) {
    __syncthreads();  // this buffer is written, and the other one no longer read
    const int64_t next = t0 + at.tokens;
    if (next < span.last) request.issue(p.x, at, next, span.last);
    const RecurrentBuffer<C> block(reinterpret_cast<float*>(shared) + buffer * floats, at.tokens,
                                   tile);
    for (int i = 0; i < at.tokens && t0 + i < span.last; ++i) {
      const float* const k = block.k + i * C::kTileK + C::k(lane, 0);
      const float* const q = block.q + i * C::kTileK + C::k(lane, 0);
      const float* const rows = C::kChannels ? block.rows + i * C::kTileK + C::k(lane, 0) : nullptr;
      const float all = block.gate[2 * i];
      float decay[4] = {all, all, all, all}, beta = block.gate[2 * i + 1], own = all;
      if constexpr (C::kChannels) {
        load_shared(block.decay + i * tile + column, decay);
#pragma unroll
        for (int r = 0; r < 4; ++r) decay[r] *= all;
        own *= block.decay[i * tile + mine], beta *= block.beta[i * tile + mine];
      }
      float read[4] = {}, u[4], out[4] = {};
      read_columns<C>(
          S,
          [&](int n, float(&a)[4]) {
            load_shared(k + C::k(0, n), a);
            if constexpr (C::kChannels) {
              float d[4];
              load_shared(rows + C::k(0, n), d);
#pragma unroll
              for (int w = 0; w < 4; ++w) a[w] *= d[w];
            }
          },
          read);
      const float e = block.v[i * tile + mine] - own * sum_of_row<C::kLanes>(read, lane);
      gather_rows(beta * e, u);
      update<C>(S, k, q, rows, decay, u, out);
      const float sum = sum_of_row<C::kLanes>(out, lane);
      if (lane < 4 && at.v0 + mine < V) from_float(sum, o + (t0 + i) * s.HV * V + at.v0 + mine);
    }
    if (next < span.last) deliver(next, buffer ^ 1);
  }
  if (p.final_state) store_state<C>(p.final_state, place, S);
}

template <class C>
void recurrent_fwd_launch(const RecurrentFwdArgs& p, const Offsets& offsets, void* stream) {
  const ChunkShape& s = p.x.in.shape;
  const int64_t sequences = offsets.N + (offsets.data ? 1 : 0);
  const auto grid = [&](int64_t warps) {
    const int64_t tile = warps * C::kRowsPerWarp;
    return sequences * s.HV * ((s.V + tile - 1) / tile);
  };
  int64_t warps = C::kMaxWarps;
  constexpr int64_t kTwoPerSm = 2 * 132;
  while (warps > 1 && (grid(warps) < kTwoPerSm || warps / 2 * C::kRowsPerWarp >= s.V)) warps /= 2;
  if (grid(warps) == 0) return;
  const int floats =
      RecurrentBuffer<C>::floats(int(warps) * C::kTokens, int(warps) * C::kRowsPerWarp);
  recurrent_fwd_kernel<C><<<unsigned(grid(warps)), unsigned(warps * 32), 2 * floats * sizeof(float),
                            static_cast<cudaStream_t>(stream)>>>(p, offsets);
}

template <class E, bool kChannels>
void recurrent_fwd_heads(const RecurrentFwdArgs& p, const Offsets& offsets, void* stream) {
  const int64_t K = p.x.in.shape.K;
  if (K <= 64) return recurrent_fwd_launch<RecurrentConfig<E, 64, kChannels>>(p, offsets, stream);
  if (K <= 128) return recurrent_fwd_launch<RecurrentConfig<E, 128, kChannels>>(p, offsets, stream);
  recurrent_fwd_launch<RecurrentConfig<E, 256, kChannels>>(p, offsets, stream);
}
template <class E>
void recurrent_fwd_dispatch(const RecurrentFwdArgs& p, const Offsets& offsets, void* stream) {
  p.x.gk.data || p.x.gv.data || p.x.beta_per_channel
      ? recurrent_fwd_heads<E, true>(p, offsets, stream)
      : recurrent_fwd_heads<E, false>(p, offsets, stream);
}
}  // namespace df::cuda
