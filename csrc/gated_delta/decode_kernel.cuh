// Gated delta rule, 1 to 8 tokens on an indexed pool of states, in place:
//   g = -exp(A_log) softplus(a + dt_bias); beta = sigmoid(b); k^ = k / |k|; q^ = scale q / |q|
//   u = beta (v - e^g S k^);  S <- e^g S + u k^T;  o = S q^        (S is V x K in both layouts)
//
// CTA = (row, value head, V tile), 32 to 128 threads: fewer, with a smaller tile, where that leaves
// the busiest of few SMs less. Threads: kLanes of them share the K of a row of S and hold kSlice
// elements of each of kRows rows in registers, for all tokens:
//   v_first [V][K]: 8 or 16 neighbouring lanes, 2 rows a thread;   tile = 8 or 4 rows a warp
//   k_first [K][V]: 16 lanes two apart, a vector of rows a thread;  tile = 8 or 16 rows a warp
// so that a warp's 128-bit accesses fill whole 32-byte sectors in both layouts. The exception are
// 16-bit k_first states with K > 128: 32 lanes, half sectors whose other half the next warp takes,
// since two vectors a K would need 128 registers of state. States that are not 16-byte aligned, or
// whose rows are not whole vectors, take the variant with kVec = 1.
// The state and the inputs, in the type they have in memory, are requested before the first of them
// is used: one latency of memory a CTA, two with indices (and one more for every further one or two
// tokens a warp). While the state travels, the warps stage q^, k^, v and the gates as float: warp w
// the tokens w, w + warps, ..., the last warp the gates, so that at T = 1 the norms and the gate's
// exponentials are different warps' work.
// o = e^g S q^ + (k^ q^) u from the state before the update: the sums for u and o run side by side.
// Shared memory: 4 T (2 kTileK + tile + 3) bytes (1.2 KB at T=1, K=128; 18.5 KB at T=8, K=256), in
// the order in which a thread reads its slice. Reads of q^ and k^ are free of bank conflicts, those
// of v at most 2-way (k_first), the stores of the staging up to 4-way.
// Registers: kRows * kSlice of state. Up to 32, 5 CTAs fit an SM, with 64 (wide or 16-bit k_first
// states) 4: at K >= 128 from 40 KB (16-bit v_first) to 128 KB of state in flight an SM, where 26
// KB hide 800 ns at 4.3 TB/s. Bytes a CTA: its part of S once in and once out, 2 K + 2 tile
// elements a token. FLOPs: 8 K tile a token. Bound by memory: 1 FLOP a byte for one token and a
// float state.
#pragma once
#include "common/cuda/load.cuh"
#include "common/cuda/math.cuh"
#include "common/cuda/reduce.cuh"
#include "gated_delta/decode.h"
#include "gated_delta/input.cuh"
#include "gated_delta/input_bits.cuh"

namespace df::cuda {
template <class State_, bool kVFirst_, int kTileK_, int kVec_>
struct DecodeConfig {
  using State = State_;
  static constexpr bool kVFirst = kVFirst_;
  static constexpr int kTileK = kTileK_, kVec = kVec_;  // the largest K; elements an access
  static constexpr int kMaxThreads = 128;
  static constexpr int kLanes = kVFirst ? (kTileK > 128 ? 16 : 8) : kTileK * kVec > 1024 ? 32 : 16;
  static constexpr int kStride = kVFirst ? 1 : 32 / kLanes;  // from lane to lane of a row
  static constexpr int kRows = kVFirst ? 2 : kVec;
  static constexpr int kSlice = kTileK / kLanes;
  static constexpr int kVectors = kRows * kSlice / kVec;  // accesses a thread
  static constexpr int kRowsPerWarp = 32 / kLanes * kRows;
  static constexpr int kCtas = kRows * kSlice <= 32 ? 5 : 4;  // an SM's registers hold

  // element w of access i is (row, element of the slice)
  static constexpr int row(int i, int w) { return kVFirst ? i / (kSlice / kVec) : w; }
  static constexpr int part(int i, int w) { return kVFirst ? i % (kSlice / kVec) * kVec + w : i; }
  // where element n of a lane's slice stands in K, and in shared memory
  static constexpr int k(int lane, int n) {
    return kVFirst ? (n / kVec * kLanes + lane) * kVec + n % kVec : n * kLanes + lane;
  }
  static constexpr int staged(int lane, int n) { return (n / 4 * kLanes + lane) * 4 + n % 4; }
  static constexpr int staged(int k) {
    return kVFirst ? staged(k / kVec % kLanes, k / (kVec * kLanes) * kVec + k % kVec)
                   : staged(k % kLanes, k / kLanes);
  }
};

struct DecodeRow {  // what a CTA works on; hk: the head of q and k
  int64_t b, h, hk, read, write;
  int v0, tile;
};

template <class C>
struct DecodeShared {
  float *q, *k, *v, *gate;  // gate: e^g, beta and k^ q^ of each token
  __device__ DecodeShared(float4* base, int T, int tile) {
    q = reinterpret_cast<float*>(base), k = q + T * C::kTileK;
    v = k + T * C::kTileK, gate = v + T * tile;
  }
  static size_t bytes(int64_t T, int64_t tile) {
    return T * (2 * C::kTileK + tile + 3) * sizeof(float);
  }
};

__device__ inline int64_t decode_slot(const void* indices, bool is64, int64_t b, int64_t pool) {
  const int64_t slot = !indices ? b
                       : is64   ? static_cast<const int64_t*>(indices)[b]
                                : static_cast<const int32_t*>(indices)[b];
  if (slot >= pool) __trap();
  return slot;
}

// A row of q or k (never float64), an element of each 32 a lane; zeros behind it.
template <int kParts>
__device__ inline void decode_request(const Input& x, int64_t row, int64_t K,
                                      uint32_t (&bits)[kParts]) {
  const int lane = threadIdx.x % 32;
  if (x.dtype == DType::f32)
    input_bits<32>(static_cast<const uint32_t*>(x.data) + row + lane, K - lane, bits);
  else
    input_bits<32>(static_cast<const uint16_t*>(x.data) + row + lane, K - lane, bits);
}

// q^, k^ and their product to shared memory; a warp has a token at a time, or two.
template <class C>
__device__ inline void decode_stage_keys(const DecodeArgs& p, const DecodeRow& at,
                                         const DecodeShared<C>& to) {
  constexpr int kParts = C::kTileK / 32, kTokens = C::kTileK > 128 || C::kCtas < 5 ? 1 : 2;
  const int T = int(p.T), warps = blockDim.x / 32, lane = threadIdx.x % 32;
  for (int first = threadIdx.x / 32; first < T; first += kTokens * warps) {
    uint32_t q_bits[kTokens][kParts], k_bits[kTokens][kParts];
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int t = first + i * warps;
      if (t >= T) break;
      decode_request(p.q, offset(p.q, at.b, t, at.hk), p.K, q_bits[i]);
      decode_request(p.k, offset(p.k, at.b, t, at.hk), p.K, k_bits[i]);
    }
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const int t = first + i * warps;
      if (t >= T) break;
      float q[kParts], k[kParts], qq = 0, kk = 0, qk = 0;
#pragma unroll
      for (int c = 0; c < kParts; ++c) {
        q[c] = from_input_bits(q_bits[i][c], p.q.dtype),
        k[c] = from_input_bits(k_bits[i][c], p.k.dtype);
        qq += q[c] * q[c], kk += k[c] * k[c], qk += q[c] * k[c];
      }
      qq = lane_sum<32>(qq), kk = lane_sum<32>(kk), qk = lane_sum<32>(qk);
      const float of_q = float(p.scale) * (p.l2norm ? rsqrtf(qq + 1e-6f) : 1);
      const float of_k = p.l2norm ? rsqrtf(kk + 1e-6f) : 1;
      if (lane == 0) to.gate[3 * t + 2] = qk * of_q * of_k;
#pragma unroll
      for (int c = 0; c < kParts; ++c) {
        const int place = t * C::kTileK + C::staged(c * 32 + lane);
        to.q[place] = q[c] * of_q, to.k[place] = k[c] * of_k;
      }
    }
  }
}

// Everything the CTA's tokens need but the state to shared memory. The gates are the last warp's,
// which has the fewest rows of q and k.
template <class C>
__device__ inline void decode_stage(const DecodeArgs& p, const DecodeRow& at,
                                    const DecodeShared<C>& to) {
  constexpr int kValues = (8 * C::kRowsPerWarp + 31) / 32;  // a thread's, of at most 8 tokens
  const int T = int(p.T), tile_bits = __ffs(at.tile) - 1;
  const int64_t t_gate = int(threadIdx.x) - int(blockDim.x) + 32;
  const bool has_gate = t_gate >= 0 && t_gate < T;
  uint32_t a = 0, dt_bias = 0, A_log = 0, b = 0, values[kValues];
  if (has_gate) {
    a = input_bits(p.a, offset(p.a, at.b, t_gate, at.h));
    b = input_bits(p.b, offset(p.b, at.b, t_gate, at.h));
    A_log = input_bits(p.A_log, at.h);
    if (p.dt_bias.data) dt_bias = input_bits(p.dt_bias, at.h);
  }
  const int64_t of_v = offset(p.v, at.b, 0, at.h) + at.v0;
#pragma unroll
  for (int n = 0; n < kValues; ++n) {
    const int i = n * blockDim.x + threadIdx.x, t = i >> tile_bits, v = i & (at.tile - 1);
    values[n] = t < T && at.v0 + v < p.V ? input_bits(p.v, of_v + t * p.v.t + v) : 0;
  }
  decode_stage_keys(p, at, to);
#pragma unroll
  for (int n = 0; n < kValues; ++n) {
    const int i = n * blockDim.x + threadIdx.x;
    if (i < T * at.tile) to.v[i] = from_input_bits(values[n], p.v.dtype);
  }
  if (has_gate) {
    const float x = from_input_bits(a, p.a.dtype) + from_input_bits(dt_bias, p.dt_bias.dtype);
    const float g = -expf(from_input_bits(A_log, p.A_log.dtype)) * softplus(x);
    to.gate[3 * t_gate] = expf(g < -88 ? -88 : g);  // not fmaxf: NaN stays NaN
    to.gate[3 * t_gate + 1] = sigmoid(from_input_bits(b, p.b.dtype));
  }
}

template <class C>
__global__ void __launch_bounds__(C::kMaxThreads, C::kCtas)
    decode_kernel(const __grid_constant__ DecodeArgs p, unsigned tiles) {
  using State = typename C::State;
  const int K = int(p.K), V = int(p.V), T = int(p.T);
  DecodeRow at;
  at.tile = blockDim.x / 32 * C::kRowsPerWarp;
  at.b = blockIdx.x / tiles;
  at.v0 = int(blockIdx.x % tiles) * at.tile;
  at.hk = blockIdx.y;
  at.h = blockIdx.y * gridDim.z + blockIdx.z;
  at.read = decode_slot(p.read, p.read64, at.b, p.P);
  at.write = p.write ? decode_slot(p.write, p.write64, at.b, p.P) : at.read;

  if (at.read < 0) {  // padding: nothing but the output exists
    for (int i = threadIdx.x; i < T * at.tile; i += blockDim.x)
      if (at.v0 + i % at.tile < V)
        store_any(0, p.output, p.o.dtype,
                  offset(p.o, at.b, i / at.tile, at.h) + at.v0 + i % at.tile);
    return;
  }

  const int tid = threadIdx.x, groups = blockDim.x / C::kLanes;
  const int lane = tid / C::kStride % C::kLanes;
  const int group = C::kVFirst ? tid / C::kLanes : tid / 32 * C::kStride + tid % C::kStride;
  const auto row_in_tile = [&](int r) {
    return C::kVFirst ? r * groups + group : group * C::kVec + r;
  };
  // fn(access i, its place in a state) for this thread's accesses that are inside; most CTAs are
  // inside as a whole and need no predicates
  const int64_t row_step = int64_t(groups) * K, k_step = C::kVFirst ? 1 : V;
  const int64_t v_first = at.v0 + row_in_tile(0);
  const int64_t first =
      at.h * K * V + (C::kVFirst ? v_first * K : v_first) + C::k(lane, 0) * k_step;
  const bool whole = K == C::kTileK && at.v0 + at.tile <= V;
  const auto each_access = [&](auto fn) {
    const auto access = [&](int i) {
      fn(i, first + C::row(i, 0) * row_step + C::k(0, C::part(i, 0)) * k_step);
    };
    if (whole) {
#pragma unroll
      for (int i = 0; i < C::kVectors; ++i) access(i);
    } else {
#pragma unroll
      for (int i = 0; i < C::kVectors; ++i)
        if (at.v0 + row_in_tile(C::row(i, 0)) < V && C::k(lane, C::part(i, 0)) < K) access(i);
    }
  };
  float S[C::kRows][C::kSlice] = {};
  const auto store = [&](void* pool, int64_t slot_offset) {
    State* const to = static_cast<State*>(pool) + slot_offset;
    each_access([&](int i, int64_t place) {
      float x[C::kVec];
#pragma unroll
      for (int w = 0; w < C::kVec; ++w) x[w] = S[C::row(i, w)][C::part(i, w)];
      store_vector<C::kVec>(to + place, x);
    });
  };

  const State* const from = static_cast<const State*>(p.state) + at.read * p.state_stride;
  each_access([&](int i, int64_t place) {
    float x[C::kVec];
    load_vector<C::kVec>(from + place, x);
#pragma unroll
    for (int w = 0; w < C::kVec; ++w) S[C::row(i, w)][C::part(i, w)] = x[w];
  });

  extern __shared__ float4 shared[];
  const DecodeShared<C> staged(shared, T, at.tile);
  decode_stage(p, at, staged);
  __syncthreads();

  // the lane that stores row r is the r-th of its group
  const int v_out = at.v0 + row_in_tile(lane);
  int64_t out = offset(p.o, at.b, 0, at.h) + v_out;
  for (int t = 0; t < T; ++t, out += p.o.t) {
    const float* const gate = staged.gate + 3 * t;
    const float decay = gate[0], beta = gate[1], key_query = gate[2];
    const float* const k_t = staged.k + t * C::kTileK + C::staged(lane, 0);
    const float* const q_t = staged.q + t * C::kTileK + C::staged(lane, 0);
    float u[C::kRows] = {}, o[C::kRows] = {};
#pragma unroll
    for (int n = 0; n < C::kSlice; n += 4) {
      float k[4], q[4];
      load_shared(k_t + C::staged(0, n), k);
      load_shared(q_t + C::staged(0, n), q);
#pragma unroll
      for (int w = 0; w < 4; ++w)
#pragma unroll
        for (int r = 0; r < C::kRows; ++r) u[r] += S[r][n + w] * k[w], o[r] += S[r][n + w] * q[w];
    }
    float mine = 0;
#pragma unroll
    for (int r = 0; r < C::kRows; ++r) {
      const float read = lane_sum<C::kLanes, C::kStride>(u[r]);
      const float query = lane_sum<C::kLanes, C::kStride>(o[r]);
      u[r] = beta * (staged.v[t * at.tile + row_in_tile(r)] - decay * read);
      if (lane == r) mine = decay * query + u[r] * key_query;
    }
#pragma unroll
    for (int n = 0; n < C::kSlice; n += 4) {
      float k[4];
      load_shared(k_t + C::staged(0, n), k);
#pragma unroll
      for (int w = 0; w < 4; ++w)
#pragma unroll
        for (int r = 0; r < C::kRows; ++r) S[r][n + w] = decay * S[r][n + w] + u[r] * k[w];
    }
    if (lane < C::kRows && v_out < V) store_any(mine, p.output, p.o.dtype, out);
    if (p.snapshots) store(p.snapshots, (at.b * T + t) * p.HV * K * V);
  }
  if (at.write >= 0) store(p.state, at.write * p.state_stride);
}

template <class C>
void decode_launch(const DecodeArgs& p, void* stream) {
  const auto tiles = [&](int64_t warps) {
    const int64_t tile = warps * C::kRowsPerWarp;
    return (p.V + tile - 1) / tile;
  };
  const auto warps_an_sm = [&](int64_t warps) {
    constexpr int64_t kSms = 132;
    return (p.B * p.HV * tiles(warps) + kSms - 1) / kSms * warps;
  };
  int64_t warps = C::kMaxThreads / 32;
  while (warps > 1 && warps / 2 * C::kRowsPerWarp >= p.V) warps /= 2;
  for (int64_t fewer = warps / 2; fewer >= 1 && warps_an_sm(warps) <= 16; fewer /= 2)
    if (warps_an_sm(fewer) < warps_an_sm(warps)) warps = fewer;
  const dim3 grid(p.B * tiles(warps), p.H, p.HV / p.H);
  const size_t shared = DecodeShared<C>::bytes(p.T, warps * C::kRowsPerWarp);
  const auto on = static_cast<cudaStream_t>(stream);
  decode_kernel<C><<<grid, warps * 32, shared, on>>>(p, tiles(warps));
}

template <class State, bool kVFirst>
void decode_layout(const DecodeArgs& p, void* stream) {
  constexpr int kVec = 16 / sizeof(State);
  const auto on_boundary = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  const bool vectors = on_boundary(p.state) && on_boundary(p.snapshots) &&
                       p.state_stride % kVec == 0 && (kVFirst ? p.K : p.V) % kVec == 0;
  if (!vectors) return decode_launch<DecodeConfig<State, kVFirst, 256, 1>>(p, stream);
  if (p.K <= 64) return decode_launch<DecodeConfig<State, kVFirst, 64, kVec>>(p, stream);
  if (p.K <= 128) return decode_launch<DecodeConfig<State, kVFirst, 128, kVec>>(p, stream);
  decode_launch<DecodeConfig<State, kVFirst, 256, kVec>>(p, stream);
}

template <class State>
void decode_dispatch(const DecodeArgs& p, void* stream) {
  p.v_first ? decode_layout<State, true>(p, stream) : decode_layout<State, false>(p, stream);
}
}  // namespace df::cuda
