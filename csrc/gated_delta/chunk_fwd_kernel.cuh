// Forward of the chunked gated delta rule (gated_delta.md, 2.3). For each chunk of C tokens
//   W = V - gam o (K S)   E = T' W   U = beta o E   O = sc [gam o (Q S) + P U]
//   S <- e^{G_C} S + K^T (del o U)
// A CTA has one value head of one sequence and 64 or 128 rows of S^T (of V). Warpgroup 0 runs ahead
// of the others by a chunk: it loads q, k and v, makes the tables of tokens, T' and P. Each other
// warpgroup owns 64 rows of S^T (V x K) in fp32 registers. All its products have their operand A in
// registers, made from the accumulator before, and B in shared memory:
//   R^T = S^T K^T   Y^T = S^T Q^T   W^T = V^T - gam o R^T   E^T = W^T T'^T   U^T = beta o E^T
//   O^T = sc [gam o Y^T + U^T P^T]   S^T = e^{G_C} S^T + (del o U)^T K
// so that S, W, E and U never exist in memory. O leaves through the tile that v came in.
// The same source runs on mma.sync (any device, any strides, float as 3xTF32 with C = 32) and on
// wgmma with TMA; there warpgroup 0 gives registers to the others (setmaxnreg).
//   shared memory, K = 128, 128 rows, 16 bits: 2 stages (sm_80) or 3 (sm_90a) of 32 KB k, q and
//   16 KB v; 2 x (16 KB T' + 8 KB P + 2.5 KB tables): 149 KB or 197 KB; high precision: 8 KB more
//   of P a table. One CTA an SM.
//   registers: at most 168 a thread of 384 (sm_90a: 104 ahead, 200 state), 255 of 256
//   a chunk, K = 128, V = 128: 9.1 MFLOP for 64 KB read and 16 KB written; the chain of five
//   dependent products a chunk bounds it, not their number
#pragma once
#include "common/cuda/mma_sm90.cuh"
#include "gated_delta/chunk_fwd_cuda.h"
#include "gated_delta/chunk_squares.cuh"
#include "gated_delta/chunk_state.cuh"
#include "gated_delta/chunk_tma.h"

namespace df::cuda {
struct NoMaps {};
struct FwdMaps {
  CUtensorMap q, k, v;
};

template <class Arch_, class E_, int kK_, int kGroups_, bool kHigh_>
struct FwdConfig {
  using Arch = Arch_;
  using E = E_;
  static constexpr int kK = kK_, kGroups = kGroups_, kC = kChunk<E>;
  static constexpr bool kHigh = kHigh_, kAsync = Arch::kAsync;
  using Maps = std::conditional_t<kAsync, FwdMaps, NoMaps>;
  using Work = Squares<Arch, E, kC, kK>;
  using Keys = typename Work::Keys;
  using Square = typename Work::Square;
  using Values = Tile<E, kC, 64 * kGroups>;
  static constexpr int kStages = kAsync ? (kK > 128 ? 2 : 3) : (sizeof(E) == 2 && kK > 128 ? 1 : 2);
  static constexpr int kTables = kStages < 2 ? kStages : 2;
  static constexpr int kThreads = 128 * (1 + kGroups);
  static constexpr int kAttention = kHigh ? 2 : 1;  // parts of P
  // Y = Q S with R = K S, where registers allow it: its product then hides behind what follows.
  static constexpr bool kEarlyY = kAsync && kK <= 128;
  static constexpr int kPart = kK < 128 ? kK : 128;  // columns of S^T that are operands at once

  struct Table {
    TokenTable<kC> tokens;
    ChunkFactors<kC> factors;
  };
  struct Rest {
    Pipeline<kStages, kTables> pipe;
    Table tables[kTables];
  };
  static constexpr int kStageBytes = Keys::kBytes + Values::kBytes;
  static constexpr int kTableBytes = (Work::kParts + kAttention) * Square::kBytes;
  static constexpr int kTiles = kStages * kStageBytes + kTables * kTableBytes;
  static constexpr int kShared = kTiles + int(sizeof(Rest));
};

template <class F>
struct FwdShared {
  uint32_t base;
  typename F::Rest* rest;
  __device__ explicit FwdShared(void* p)
      : base(shared_address(p)),
        rest(reinterpret_cast<typename F::Rest*>(static_cast<char*>(p) + F::kTiles)) {}
  __device__ uint32_t stage(int64_t chunk) const {
    return base + uint32_t(chunk % F::kStages) * F::kStageBytes;
  }
  __device__ typename F::Keys keys(int64_t chunk) const { return {stage(chunk)}; }
  __device__ typename F::Values values(int64_t chunk) const {
    return {stage(chunk) + F::Keys::kBytes};
  }
  __device__ uint32_t inverse(int64_t chunk) const {
    return base + F::kStages * F::kStageBytes + uint32_t(chunk % F::kTables) * F::kTableBytes;
  }
  __device__ uint32_t attention(int64_t chunk) const {
    return inverse(chunk) + F::Work::kParts * F::Square::kBytes;
  }
  __device__ typename F::Table& table(int64_t chunk) const {
    return rest->tables[chunk % F::kTables];
  }
};

constexpr int kAheadBarrier = 1;

template <class F>
struct Ahead {
  const ChunkFwdCuda& p;
  const typename F::Maps& maps;
  const Walk& w;
  const FwdShared<F>& shared;
  static constexpr int kC = F::kC;

  __device__ void run() const {
    constexpr int kAhead = F::kStages - F::kTables;  // loads are so far ahead of tables
    for (int64_t c = -kAhead; c < w.chunks; ++c) {
      shared.rest->pipe.wait_done(c - F::kTables);
      if (c + kAhead < w.chunks) load(c + kAhead);
      if (c >= 0) make(c);
    }
  }

 private:
  using Half = TileRows<typename F::Keys, kC>;

  __device__ void load(int64_t c) const {
    const int64_t token = w.sequence.begin + c * kC;
    const int rows = w.template rows<kC>(c), cols = int(p.in.shape.V) - w.v0;
    const Place key{w.sequence.batch, token, w.key_head, rows, 0, int(p.in.shape.K)};
    const Place value{w.sequence.batch, token, w.head, rows, w.v0, cols};
    const auto keys = shared.keys(c);
    const auto values = shared.values(c);
    if constexpr (F::kAsync) {
#if __CUDA_ARCH__ >= 900
      if (threadIdx.x != 32) return;  // the first warp loads tokens meanwhile
      uint64_t* const barrier = &shared.rest->pipe.loaded[c % F::kStages];
      mbarrier_arrive_expect(barrier, F::kStageBytes - (p.o ? 0 : F::Keys::kBytes / 2));
      load_rows_tma(keys, 0, maps.k, key, barrier);
      if (p.o) load_rows_tma(keys, kC, maps.q, key, barrier);
      load_rows_tma(values, 0, maps.v, value, barrier);
#endif
    } else {
      load_rows<128>(Half{keys, 0}, p.in.k, key, p.vectors, threadIdx.x);
      if (p.o) load_rows<128>(Half{keys, kC}, p.in.q, key, p.vectors, threadIdx.x);
      load_rows<128>(values, p.in.v, value, p.vectors, threadIdx.x);
      cp_async_commit();
    }
  }

  __device__ void wait_loaded(int64_t c) const {
    if constexpr (F::kAsync) {
      shared.rest->pipe.wait_loaded(c);
      const int rows = w.template rows<kC>(c);
      if (rows == kC) return;
      clear_rows<128>(Half{shared.keys(c), 0}, rows, threadIdx.x);
      if (p.o) clear_rows<128>(Half{shared.keys(c), kC}, rows, threadIdx.x);
      clear_rows<128>(shared.values(c), rows, threadIdx.x);
      F::Arch::stores_visible();
    } else {
      cp_async_wait<0>();
    }
  }

  __device__ void make(int64_t c) const {
    auto& table = shared.table(c);
    const int thread = threadIdx.x;
    if (thread < 32)
      load_tokens<kC>(p.in, w.sequence.batch, w.sequence.begin + c * kC, w.template rows<kC>(c),
                      w.head, table.tokens);
    wait_loaded(c);
    named_barrier_sync(kAheadBarrier, 128);
    const auto keys = shared.keys(c);
    row_norms<128>(Half{keys, 0}, p.in.l2norm, thread, table.tokens.rk);
    row_norms<128>(Half{keys, kC}, p.in.l2norm && p.o, thread, table.tokens.rq);
    named_barrier_sync(kAheadBarrier, 128);
    combine_factors(table.tokens, table.factors, thread);
    F::Work::template make<F::kHigh>(keys, table.tokens, p.o != nullptr, shared.inverse(c),
                                     shared.attention(c), kAheadBarrier);
    F::Arch::stores_visible();
    shared.rest->pipe.arrive_ready(c);
    if (p.inverse.data && w.v0 == 0) save_inverse(c);
  }

  __device__ void save_inverse(int64_t c) const {
    using E = typename F::E;
    named_barrier_sync(kAheadBarrier, 128);
    constexpr int kUnit = 16 / int(sizeof(E)), kUnits = kC / kUnit;
    E* const to = static_cast<E*>(p.inverse.data) + (w.sequence.slot + c) * p.inverse.slot +
                  w.head * p.inverse.head;
#pragma unroll
    for (int part = 0; part < F::Work::kParts; ++part) {
      const typename F::Square tile{shared.inverse(c) + part * F::Square::kBytes};
      for (int i = threadIdx.x; i < kC * kUnits; i += 128) {
        float x[4];
        load_shared4(tile.at(i / kUnits, i % kUnits * kUnit), x);
        __stcg(reinterpret_cast<float4*>(to + part * kC * kC) + i, float4{x[0], x[1], x[2], x[3]});
      }
    }
  }
};

// c_ij <- c_ij factor_j
template <int kN>
__device__ inline void scale_columns(float (&c)[kN][4], const float* factor) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 f = *reinterpret_cast<const float2*>(factor + fragment_col(n, 0));
    c[n][0] *= f.x, c[n][1] *= f.y, c[n][2] *= f.x, c[n][3] *= f.y;
  }
}
template <int kN>
__device__ inline void scale_all(float (&c)[kN][4], float factor) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] *= factor;
}

// r_ij <- v_ij - factor_j r_ij
template <class E, int kC>
__device__ inline void subtract_from(const Fragment<E, kC>& v, const float* factor,
                                     float (&r)[kC / 8][4]) {
  scale_columns(r, factor);
#pragma unroll
  for (int n = 0; n < kC / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 x;
      if constexpr (sizeof(E) == 2)
        x = unpack<E>(v.r[n / 2][n % 2 * 2 + half]);
      else
        x = {v.r[n][2 * half], v.r[n][2 * half + 1]};
      r[n][2 * half] = x.x - r[n][2 * half], r[n][2 * half + 1] = x.y - r[n][2 * half + 1];
    }
}

// An operand A as one fragment, or, in high precision, as the sum of two.
template <class E, int kK, bool kHigh>
struct Operand2 {
  Fragment<E, kK> high;
};
template <class E, int kK>
struct Operand2<E, kK, true> {
  Fragment<E, kK> high, low;
};

template <class F>
struct StateGroup {
  using Arch = typename F::Arch;
  using E = typename F::E;
  static constexpr int kC = F::kC, kK = F::kK, kPart = F::kPart;
  using Small = Operand2<E, kC, F::kHigh>;
  using Part = Fragment<E, kPart>;
  using Rows = Operand<E, Major::k>;

  const ChunkFwdCuda& p;
  const Walk& w;
  const FwdShared<F>& shared;
  int group;
  float S[kK / 8][4];

  __device__ int v0() const { return w.v0 + 64 * group; }

  __device__ void run() {
    const ChunkShape& shape = p.in.shape;
    const int64_t state = (w.n * shape.HV + w.head) * shape.K * shape.V;
    load_state(p.initial_state, state, p.in.state_v_first, shape, v0(), S);
    for (int64_t c = 0; c < w.chunks; ++c) chunk(c);
    if (p.final_state) store_state(p.final_state + state, p.in.state_v_first, shape, v0(), S);
  }

 private:
  __device__ static void split(const float (&c)[kC / 8][4], Small& a) {
    if constexpr (F::kHigh)
      split_fragment<E, kC>(c, a.high, a.low);
    else
      to_fragment<E, kC>(c, a.high);
  }
  __device__ static void begin(Small& a) {
    if constexpr (F::kHigh)
      Arch::begin(a.high, a.low);
    else
      Arch::begin(a.high);
  }
  __device__ static void finished(Small& a) {
    if constexpr (F::kHigh)
      Arch::template wait<0>(a.high, a.low);
    else
      Arch::template wait<0>(a.high);
  }
  // c += a b, where b is the sum of kParts squares.
  template <int kParts>
  __device__ static void multiply(float (&c)[kC / 8][4], Small& a, uint32_t b) {
    using Square = typename F::Square;
    Arch::template mma<kC>(c, a.high, Square{b}.along_k());
    if constexpr (kParts == 2)
      Arch::template mma<kC>(c, a.high, Square{b + Square::kBytes}.along_k());
    if constexpr (F::kHigh) Arch::template mma<kC>(c, a.low, Square{b}.along_k());
  }

  __device__ void part_of_state(int part, Part& s) const {
    to_fragment<E, kPart>(reinterpret_cast<const float(&)[kPart / 8][4]>(S[part * kPart / 8]), s);
  }
  __device__ void save_part(int64_t c, int part, const Part& s) const {
    if (!p.states.data) return;
    const int stride = int(pad64(p.in.shape.K));
    E* const to = static_cast<E*>(p.states.data) + (w.sequence.slot + c) * p.states.slot +
                  w.head * p.states.head + int64_t(v0()) * stride;
    store_fragment<E, kPart>(s, to, stride, part * kPart, stride);
  }
  // y = S^T q^T by itself.
  __device__ void query(const Rows& q, float (&y)[kC / 8][4]) const {
    clear<kC>(y);
#pragma unroll
    for (int part = 0; part < kK / kPart; ++part) {
      Part s;
      part_of_state(part, s);
      Arch::begin(y, s);
      Arch::template mma<kC>(y, s, q.from(0, part * kPart));
      Arch::commit();
      Arch::template wait<0>(y, s);
    }
  }

  __device__ void chunk(int64_t c) {
    auto& pipe = shared.rest->pipe;
    pipe.wait_ready(c);
    if constexpr (F::kAsync) pipe.wait_loaded(c);
    const auto& table = shared.table(c);
    const auto keys = shared.keys(c);
    const auto values = shared.values(c);
    const Rows k = keys.along_k(), q = k.from(kC, 0);

    float r[kC / 8][4], y[kC / 8][4];
    clear<kC>(r), clear<kC>(y);
    Part s;
#pragma unroll
    for (int part = 0; part < kK / kPart; ++part) {
      part_of_state(part, s);
      save_part(c, part, s);
      Arch::begin(r, y, s);
      Arch::template mma<kC>(r, s, k.from(0, part * kPart));
      Arch::commit();
      if constexpr (F::kEarlyY) {
        if (p.o) Arch::template mma<kC>(y, s, q);
        Arch::commit();
      }
      Arch::template wait<F::kEarlyY>(r);
      if constexpr (!F::kEarlyY) Arch::template wait<0>(s);
    }
    Fragment<E, kC> v;
    load_fragment<kC>(v, values.along_mn().from(0, 64 * group));
    subtract_from<E, kC>(v, table.factors.read, r);

    Small a, d;
    split(r, a);
    float e[kC / 8][4];
    clear<kC>(e);
    Arch::begin(e), begin(a);
    multiply<F::Work::kParts>(e, a, shared.inverse(c));
    Arch::commit();
    Arch::template wait<0>(e, y, s), finished(a);

    scale_columns(e, table.tokens.beta);
    split(e, a);
    scale_columns(e, table.factors.write);
    split(e, d);
    if constexpr (!F::kEarlyY)
      if (p.o) query(q, y);
    scale_columns(y, table.factors.query);
    scale_all(S, table.tokens.chunk_decay);
    Arch::begin(S, y), begin(a), begin(d);
    Arch::template mma<kK>(S, d.high, keys.along_mn());
    if constexpr (F::kHigh) Arch::template mma<kK>(S, d.low, keys.along_mn());
    Arch::commit();
    if (p.o) multiply<F::kAttention>(y, a, shared.attention(c));
    Arch::commit();
    Arch::template wait<0>(S, y), finished(a), finished(d);

    if (p.o) write(c, values, y);
    pipe.arrive_done(c);
  }

  __device__ void write(int64_t c, const typename F::Values& values, float (&y)[kC / 8][4]) const {
    const ChunkShape& shape = p.in.shape;
    scale_all(y, p.in.scale);
    __syncwarp();
    store_transposed<kC>(y, values, 64 * group);
    __syncwarp();
    const int64_t token = w.sequence.batch * shape.T + w.sequence.begin + c * kC;
    E* const to = static_cast<E*>(p.o) + (token * shape.HV + w.head) * shape.V + v0();
    store_output(values, 64 * group, to, shape.HV * shape.V, w.template rows<kC>(c),
                 int(shape.V) - v0(), shape.V % (16 / int(sizeof(E))) == 0);
    Arch::stores_visible();
  }
};

template <class F>
__global__ __launch_bounds__(F::kThreads,
                             1) void chunk_fwd_kernel(const __grid_constant__ ChunkFwdCuda p,
                                                      const __grid_constant__
                                                      typename F::Maps maps) {
  extern __shared__ __align__(1024) char raw[];
  const FwdShared<F> shared(raw);
  const Walk w = walk_of<F::kC>(p.in, blockIdx.x, 64 * F::kGroups);
  const int groups = p.in.shape.V - w.v0 > 64 ? F::kGroups : 1;  // with rows of V
  if (threadIdx.x == 0) shared.rest->pipe.init(128, 4 * groups);
  __syncthreads();
  const int group = int(threadIdx.x) / 128 - 1;
  if (group < 0) {
#if __CUDA_ARCH__ >= 900
    if constexpr (F::kAsync && F::kGroups == 2) registers_down<104>();
#endif
    Ahead<F>{p, maps, w, shared}.run();
  } else {
#if __CUDA_ARCH__ >= 900
    if constexpr (F::kAsync && F::kGroups == 2) registers_up<200>();
#endif
    if (group < groups) StateGroup<F>{p, w, shared, group}.run();
  }
}

template <class F>
void chunk_fwd_launch(const ChunkFwdCuda& p, const typename F::Maps& maps, void* stream) {
  const ChunkShape& shape = p.in.shape;
  const int64_t tile = 64 * F::kGroups;
  const int64_t blocks = (shape.V + tile - 1) / tile * shape.HV * p.in.N;
  cudaFuncSetAttribute(chunk_fwd_kernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       F::kShared);
  chunk_fwd_kernel<F>
      <<<unsigned(blocks), F::kThreads, F::kShared, static_cast<cudaStream_t>(stream)>>>(p, maps);
}

template <class Arch, class E, int kK, bool kHigh>
void chunk_fwd_rows(const ChunkFwdCuda& p, const auto& maps, void* stream) {
  // two state warpgroups where registers and shared memory allow it
  constexpr bool kTwo = kK <= 128 && !(kHigh && kK == 128 && !Arch::kAsync);
  if constexpr (kTwo)
    if (p.in.shape.V > 64)
      return chunk_fwd_launch<FwdConfig<Arch, E, kK, 2, kHigh>>(p, maps, stream);
  chunk_fwd_launch<FwdConfig<Arch, E, kK, 1, kHigh>>(p, maps, stream);
}
template <class Arch, class E, int kK>
void chunk_fwd_precision(const ChunkFwdCuda& p, const auto& maps, void* stream) {
  if constexpr (sizeof(E) == 2)
    if (p.high_precision) return chunk_fwd_rows<Arch, E, kK, true>(p, maps, stream);
  chunk_fwd_rows<Arch, E, kK, false>(p, maps, stream);
}
template <class Arch, class E>
void chunk_fwd_dispatch(const ChunkFwdCuda& p, const auto& maps, void* stream) {
  if (p.in.shape.K <= 64) return chunk_fwd_precision<Arch, E, 64>(p, maps, stream);
  if (p.in.shape.K <= 128) return chunk_fwd_precision<Arch, E, 128>(p, maps, stream);
  chunk_fwd_precision<Arch, E, 256>(p, maps, stream);
}

// With the maps of its inputs.
template <class E>
cudaError_t chunk_fwd_tma(const ChunkFwdCuda& p, void* stream) {
  FwdMaps maps;
  cudaError_t e = make_tensor_map(&maps.k, tma_keys(p.in, p.in.k), 64);
  if (e == cudaSuccess) e = make_tensor_map(&maps.q, tma_keys(p.in, p.o ? p.in.q : p.in.k), 64);
  if (e == cudaSuccess) e = make_tensor_map(&maps.v, tma_values(p.in, p.in.v), 64);
  if (e == cudaSuccess) chunk_fwd_dispatch<Sm90, E>(p, maps, stream);
  return e;
}
}  // namespace df::cuda
