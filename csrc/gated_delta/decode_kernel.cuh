// Gated delta rule, 1 to 8 tokens on an indexed pool of states, in place:
//   g = -exp(A_log) softplus(a + dt_bias); beta = sigmoid(b); k^ = k / |k|; q^ = scale q / |q|
//   u = beta (v - e^g S k^);  S <- e^g S + u k^T;  o = S q^        (S is V x K in both layouts)
//
// CTA = (row, value head, V tile), 32 to 128 threads: fewer, with a smaller tile, while the grid
// would not give every SM two CTAs. Threads: kLanes of them share the K of a row of S and hold
// kSlice elements of each of kRows rows in registers, for all tokens:
//   v_first [V][K]: 8 or 16 neighbouring lanes, 2 rows a thread;   tile = 8 or 4 rows a warp
//   k_first [K][V]: 16 lanes two apart, a vector of rows a thread;  tile = 8 or 16 rows a warp
// so that a warp's 128-bit accesses fill whole 32-byte sectors in both layouts. The exception are
// 16-bit k_first states with K > 128: 32 lanes, half sectors whose other half the next warp takes,
// since two vectors a K would need 128 registers of state. States that are not 16-byte aligned, or
// whose rows are not whole vectors, take the variant with kVec = 1.
// The state is requested first; while it travels, the warps stage q^, k^, v and the gates as float.
// Shared memory: 4 T (2 kTileK + tile + 2) bytes (1.2 KB at T=1, K=128; 18.5 KB at T=8, K=256), in
// the order in which a thread reads its slice. Reads of q^ and k^ are free of bank conflicts, those
// of v at most 2-way (k_first), the stores of the staging up to 4-way.
// Registers: kRows * kSlice (16 to 64) of state; in all at most 128 (v_first), 156 (k_first).
// Bytes a CTA: its part of S once in and once out, 2 K + 2 tile elements a token.
// FLOPs: 6 K tile a token. Bound by memory: 0.75 FLOP a byte for one token and a float state.
#pragma once
#include "common/cuda/load.cuh"
#include "common/cuda/math.cuh"
#include "common/cuda/reduce.cuh"
#include "gated_delta/decode.h"
#include "gated_delta/input.cuh"

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

struct DecodeRow {  // what a CTA works on
  int64_t b, h, read, write;
  int v0, tile;
};

__device__ inline int64_t decode_slot(const void* indices, bool is64, int64_t b, int64_t pool) {
  const int64_t slot = !indices ? b
                       : is64   ? static_cast<const int64_t*>(indices)[b]
                                : static_cast<const int32_t*>(indices)[b];
  if (slot >= pool) __trap();
  return slot;
}

// q^, k^, v and (e^g, beta) of all tokens to shared memory.
template <class C>
__device__ inline void decode_stage(const DecodeArgs& p, const DecodeRow& at, float* sQ, float* sK,
                                    float* sV, float* sGate) {
  const int T = int(p.T), warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int64_t hk = at.h / (p.HV / p.H);
  for (int i = warp; i < 2 * T; i += warps) {
    const bool is_q = i < T;
    const int t = is_q ? i : i - T;
    const Input& from = is_q ? p.q : p.k;
    const int64_t row = offset(from, at.b, t, hk);
    float x[C::kTileK / 32], sum = 0;
#pragma unroll
    for (int c = 0; c < C::kTileK / 32; ++c) {
      const int k = c * 32 + threadIdx.x % 32;
      x[c] = k < p.K ? load_any(from, row + k) : 0;
      sum += x[c] * x[c];
    }
    float factor = is_q ? float(p.scale) : 1;
    if (p.l2norm) factor *= 1.0f / sqrtf(lane_sum<32>(sum) + 1e-6f);
#pragma unroll
    for (int c = 0; c < C::kTileK / 32; ++c)
      (is_q ? sQ : sK)[t * C::kTileK + C::staged(c * 32 + threadIdx.x % 32)] = x[c] * factor;
  }
  for (int i = threadIdx.x; i < T * at.tile; i += blockDim.x) {
    const int t = i / at.tile, v = at.v0 + i % at.tile;
    sV[i] = v < p.V ? load_any(p.v, offset(p.v, at.b, t, at.h) + v) : 0;
  }
  if (threadIdx.x < T) {
    const int64_t t = threadIdx.x;
    float a = load_any(p.a, offset(p.a, at.b, t, at.h));
    if (p.dt_bias.data) a += load_any(p.dt_bias, at.h);
    const float g = -expf(load_any(p.A_log, at.h)) * softplus(a);
    sGate[2 * t] = expf(g < -88 ? -88 : g);  // not fmaxf: NaN stays NaN
    sGate[2 * t + 1] = sigmoid(load_any(p.b, offset(p.b, at.b, t, at.h)));
  }
}

template <class C>
__global__ void __launch_bounds__(C::kMaxThreads)
    decode_kernel(const __grid_constant__ DecodeArgs p) {
  using State = typename C::State;
  const int K = int(p.K), V = int(p.V), T = int(p.T);
  const int tile = blockDim.x / 32 * C::kRowsPerWarp, tiles = (V + tile - 1) / tile;
  DecodeRow at;
  at.tile = tile;
  at.v0 = int(blockIdx.x % tiles) * tile;
  at.h = blockIdx.x / tiles % p.HV;
  at.b = blockIdx.x / tiles / p.HV;
  at.read = decode_slot(p.read, p.read64, at.b, p.P);
  at.write = p.write ? decode_slot(p.write, p.write64, at.b, p.P) : at.read;

  if (at.read < 0) {  // padding: nothing but the output exists
    for (int i = threadIdx.x; i < T * tile; i += blockDim.x)
      if (at.v0 + i % tile < V)
        store_any(0, p.output, p.o.dtype, offset(p.o, at.b, i / tile, at.h) + at.v0 + i % tile);
    return;
  }

  const int tid = threadIdx.x, groups = blockDim.x / C::kLanes;
  const int lane = tid / C::kStride % C::kLanes;
  const int group = C::kVFirst ? tid / C::kLanes : tid / 32 * C::kStride + tid % C::kStride;
  const auto row_in_tile = [&](int r) {
    return C::kVFirst ? r * groups + group : group * C::kVec + r;
  };
  // fn(access i, its place in a state) for this thread's accesses that are inside
  const auto each_access = [&](auto fn) {
#pragma unroll
    for (int i = 0; i < C::kVectors; ++i) {
      const int v = at.v0 + row_in_tile(C::row(i, 0)), k = C::k(lane, C::part(i, 0));
      if (v < V && k < K) fn(i, C::kVFirst ? v * K + k : k * V + v);
    }
  };
  float S[C::kRows][C::kSlice] = {};
  const auto store = [&](void* pool, int64_t slot, int64_t slot_stride) {
    State* const to = static_cast<State*>(pool) + slot * slot_stride + at.h * K * V;
    each_access([&](int i, int place) {
      float x[C::kVec];
#pragma unroll
      for (int w = 0; w < C::kVec; ++w) x[w] = S[C::row(i, w)][C::part(i, w)];
      store_vector<C::kVec>(to + place, x);
    });
  };

  const State* const from =
      static_cast<const State*>(p.state) + at.read * p.state_stride + at.h * K * V;
  each_access([&](int i, int place) {
    float x[C::kVec];
    load_vector<C::kVec>(from + place, x);
#pragma unroll
    for (int w = 0; w < C::kVec; ++w) S[C::row(i, w)][C::part(i, w)] = x[w];
  });

  extern __shared__ float4 shared[];
  float* const sQ = reinterpret_cast<float*>(shared);
  float* const sK = sQ + T * C::kTileK;
  float* const sV = sK + T * C::kTileK;
  float* const sGate = sV + T * tile;
  decode_stage<C>(p, at, sQ, sK, sV, sGate);
  __syncthreads();

  for (int t = 0; t < T; ++t) {
    const float decay = sGate[2 * t], beta = sGate[2 * t + 1];
    const float* const k_t = sK + t * C::kTileK + C::staged(lane, 0);
    const float* const q_t = sQ + t * C::kTileK + C::staged(lane, 0);
    float u[C::kRows] = {}, o[C::kRows] = {};
#pragma unroll
    for (int n = 0; n < C::kSlice; n += 4) {
      float k[4];
      load_shared(k_t + C::staged(0, n), k);
#pragma unroll
      for (int w = 0; w < 4; ++w)
#pragma unroll
        for (int r = 0; r < C::kRows; ++r) u[r] += S[r][n + w] * k[w];
    }
#pragma unroll
    for (int r = 0; r < C::kRows; ++r) {
      const float read = lane_sum<C::kLanes, C::kStride>(u[r]);
      u[r] = beta * (sV[t * tile + row_in_tile(r)] - decay * read);
    }
#pragma unroll
    for (int n = 0; n < C::kSlice; n += 4) {
      float k[4], q[4];
      load_shared(k_t + C::staged(0, n), k);
      load_shared(q_t + C::staged(0, n), q);
#pragma unroll
      for (int w = 0; w < 4; ++w)
#pragma unroll
        for (int r = 0; r < C::kRows; ++r) {
          S[r][n + w] = decay * S[r][n + w] + u[r] * k[w];
          o[r] += S[r][n + w] * q[w];
        }
    }
#pragma unroll
    for (int r = 0; r < C::kRows; ++r) {
      const int v = at.v0 + row_in_tile(r);
      const float sum = lane_sum<C::kLanes, C::kStride>(o[r]);
      if (lane == 0 && v < V) store_any(sum, p.output, p.o.dtype, offset(p.o, at.b, t, at.h) + v);
    }
    if (p.snapshots) store(p.snapshots, at.b * T + t, p.HV * K * V);
  }
  if (at.write >= 0) store(p.state, at.write, p.state_stride);
}

template <class C>
void decode_launch(const DecodeArgs& p, void* stream) {
  const auto grid = [&](int64_t warps) {
    const int64_t tile = warps * C::kRowsPerWarp;
    return p.B * p.HV * ((p.V + tile - 1) / tile);
  };
  int64_t warps = C::kMaxThreads / 32;
  constexpr int64_t kTwoPerSm = 2 * 132;
  while (warps > 1 && (grid(warps) < kTwoPerSm || warps / 2 * C::kRowsPerWarp >= p.V)) warps /= 2;
  const size_t shared = p.T * (2 * C::kTileK + warps * C::kRowsPerWarp + 2) * sizeof(float);
  decode_kernel<C><<<grid(warps), warps * 32, shared, static_cast<cudaStream_t>(stream)>>>(p);
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
