// Forward of the chunked gated delta rule (gated_delta.md, 2.3). For each chunk of C tokens
//   W = V - gam o (K S)   E = T' W   U = beta o E   O = sc [gam o (Q S) + P U]
//   S <- e^{G_C} S + K^T (del o U)
// A CTA has one value head of one sequence and 64 or 128 rows of S^T (of V). Warpgroup 0 runs ahead
// of the others by a chunk: it loads q, k, v and T' (floats: makes T'), makes the tables of tokens
// and P. Each other warpgroup owns 64 rows of S^T (V x K) in fp32 registers. All its products have
// their operand A in registers, made from the accumulator before, and B in shared memory:
//   R^T = S^T K^T   Y^T = S^T Q^T   W^T = V^T - gam o R^T   E^T = W^T T'^T   U^T = beta o E^T
//   O^T = sc [gam o Y^T + U^T P^T]   S^T = e^{G_C} S^T + (del o U)^T K
// so that S, W, E and U never exist in memory. O leaves through the tile that v came in.
// The same source runs on mma.sync (any device, any strides, float as 3xTF32 with C = 32) and on
// wgmma with TMA; there warpgroup 0 of three gives registers to the others (setmaxnreg). There is
// no producer warp: warpgroup 0 needs the tiles first, and issues their loads when it has to wait
// for the state warpgroups anyway.
//   shared memory, K = 128, 128 rows, 16 bits: 2 stages (sm_80) or 3 (sm_90a) of 32 KB k, q, 16 KB
//   v and 16 KB T'; 2 x 8 KB P (high precision: 16 KB and 2 stages); 14 KB tables: 159 or 223 KB
//   registers: at most 168 a thread of 384 (sm_90a: 120 ahead, 192 state, 504 of three), 255 of 256
//   a chunk, K = 128, V = 128: 8.6 MFLOP for 80 KB read and 16 KB written; the chain of five
//   dependent products a chunk bounds it, not their number
#pragma once
#include "gated_delta/chunk_fwd_state.cuh"
#include "gated_delta/chunk_tma.h"

namespace df::cuda {
constexpr int kAheadBarrier = 1;

template <class F>
struct Ahead {
  const ChunkFwdCuda& p;
  const typename F::Maps& maps;
  const Walk& w;
  const FwdShared<F>& shared;
  static constexpr int kC = F::kC;
  static_assert(registers_fit(3, 120 + 2 * 192));

  __device__ void run() const {
    constexpr int kAhead = F::kStages - F::kTables;  // loads are so far ahead of tables
    Tokens first{*this, 0};
    first.request(), first.run();
    for (int c = -kAhead; c < w.chunks; ++c) {
      shared.rest->pipe.wait_done(c - F::kTables);
      if (c + kAhead < w.chunks) load(c + kAhead);
      if (c >= 0) make(c);
    }
  }

 private:
  using Half = TileRows<typename F::Keys, kC>;

  __device__ void load(int c) const {
    const int64_t token = w.sequence.begin + int64_t(c) * kC;
    const int rows = w.template rows<kC>(c), cols = int(p.in.shape.V) - w.v0;
    const Place key{w.sequence.batch, token, w.key_head, rows, 0, int(p.in.shape.K)};
    const Place value{w.sequence.batch, token, w.head, rows, w.v0, cols};
    const auto keys = shared.keys(c);
    const auto values = shared.values(c);
    if constexpr (F::kAsync) {
#if __CUDA_ARCH__ >= 900
      if (threadIdx.x != 0) return;
      uint64_t* const barrier = &shared.rest->pipe.loaded[uint32_t(c) % F::kStages];
      mbarrier_arrive_expect(barrier, F::kStageBytes - (p.o ? 0 : F::Keys::kBytes / 2));
#pragma unroll
      for (int part = 0; part < F::Work::kParts; ++part)
        tma_load(shared.inverse(c) + part * F::Square::kBytes, &maps.inverse, barrier, 0, w.head,
                 kC * part, int(w.sequence.slot) + c);
      load_rows_tma(keys, 0, maps.k, key, barrier);
      if (p.o) load_rows_tma(keys, kC, maps.q, key, barrier);
      load_rows_tma(values, 0, maps.v, value, barrier);
#endif
    } else {
      const int thread = thread_anew();
      load_rows<128>(Half{keys, 0}, p.in.k, key, p.vectors, thread);
      if (p.o) load_rows<128>(Half{keys, kC}, p.in.q, key, p.vectors, thread);
      load_rows<128>(values, p.in.v, value, p.vectors, thread);
      if constexpr (F::kGiven) {
        using E = typename F::E;
        const E* const from = static_cast<const E*>(p.inverse.data) +
                              (w.sequence.slot + c) * p.inverse.slot + w.head * p.inverse.head;
#pragma unroll
        for (int part = 0; part < F::Work::kParts; ++part)
          load_tile<true, 128>(typename F::Square{shared.inverse(c) + part * F::Square::kBytes},
                               from + part * kC * kC, kC, kC, kC, thread);
      }
      cp_async_commit();
    }
  }

  // The tables of kBatch chunks, by a warp each, the last ones: requested, and made behind the
  // chunk before.
  struct Tokens {
    const Ahead& of;
    int first;
    LaneTokens<kC> lane{};
    __device__ int chunk() const { return first + int(threadIdx.x) / 32 - (4 - F::kBatch); }
    __device__ bool has_one() const {
      return first % F::kBatch == 0 && chunk() >= first && chunk() < of.w.chunks;
    }
    __device__ void request() {
      if (!has_one()) return;
      fetch_tokens(of.p.in, of.w.sequence.batch, of.w.sequence.begin + int64_t(chunk()) * kC,
                   of.w.template rows<kC>(chunk()), of.w.head, lane);
    }
    __device__ void run() const {
      if (!has_one()) return;
      TokenTable<kC>& table = of.shared.tokens(chunk());
      make_tokens(of.p.in, lane, of.w.template rows<kC>(chunk()), of.w.head, table);
      if (of.p.in.l2norm) return;  // norms are made with the tiles, which are not here yet
      for (int i = threadIdx.x % 32; i < kC; i += 32) table.rq[i] = table.rk[i] = 1;
    }
  };

  __device__ void wait_loaded(int c) const {
    if constexpr (F::kAsync) {
      shared.rest->pipe.wait_loaded(c);
      const int rows = w.template rows<kC>(c), thread = thread_anew();
      if (rows < kC) {
        clear_rows<128>(Half{shared.keys(c), 0}, rows, thread);
        if (p.o) clear_rows<128>(Half{shared.keys(c), kC}, rows, thread);
        clear_rows<128>(shared.values(c), rows, thread);
        F::Arch::stores_visible();
      }
    } else {
      cp_async_wait<0>();
    }
    named_barrier_sync(kAheadBarrier, 128);  // the tokens' table, too
  }

  __device__ void make(int c) const {
    auto& tokens = shared.tokens(c);
    const auto keys = shared.keys(c);
    Tokens next{*this, c + 1};
    next.request();
    wait_loaded(c);
    const auto norms = [&] {
      if (!p.in.l2norm) return;
      row_norms<128>(Half{keys, 0}, true, thread_anew(), tokens.rk);
      row_norms<128>(Half{keys, kC}, p.o != nullptr, thread_anew(), tokens.rq);
      named_barrier_sync(kAheadBarrier, 128);
    };
    if constexpr (!F::kGiven)
      F::Work::make_both(keys, tokens, p.in.scale, p.o != nullptr, shared.inverse(c),
                         shared.attention(c), kAheadBarrier, norms);
    else if (p.o)
      F::Work::template make_attention<F::kHigh>(keys, tokens, p.in.scale, shared.attention(c),
                                                 norms);
    else
      norms();
    named_barrier_sync(kAheadBarrier, 128);
    combine_factors(tokens, p.in.scale, thread_anew());
    F::Arch::stores_visible();
    shared.rest->pipe.arrive_ready(c);
    next.run();
    if constexpr (!F::kGiven)
      if (p.inverse.data && w.v0 == 0) save_inverse(c);
  }

  __device__ void save_inverse(int c) const {
    using E = typename F::E;
    named_barrier_sync(kAheadBarrier, 128);
    constexpr int kUnit = 16 / int(sizeof(E)), kUnits = kC / kUnit;
    E* const to = static_cast<E*>(p.inverse.data) + (w.sequence.slot + c) * p.inverse.slot +
                  w.head * p.inverse.head;
#pragma unroll
    for (int part = 0; part < F::Work::kParts; ++part) {
      const typename F::Square tile{shared.inverse(c) + part * F::Square::kBytes};
      for (int i = thread_anew(); i < kC * kUnits; i += 128) {
        __stcg(reinterpret_cast<float4*>(to + part * kC * kC) + i,
               load_shared4(tile.at(i / kUnits, i % kUnits * kUnit)));
      }
    }
  }
};

// CTAs of a head and sequence or segment.
template <class F>
__host__ __device__ inline int64_t fwd_tiles(const ChunkFwdCuda& p) {
  const int64_t rows = pad64(p.in.shape.V) + (p.summary ? pad64(p.in.shape.K) : 0);
  return (rows / 64 + F::kGroups - 1) / F::kGroups;
}

template <class F>
__global__ __launch_bounds__(F::kThreads,
                             1) void chunk_fwd_kernel(const __grid_constant__ ChunkFwdCuda p,
                                                      const __grid_constant__
                                                      typename F::Maps maps) {
  extern __shared__ __align__(1024) char raw[];
  const FwdShared<F> shared(raw);
  Walk& w = shared.rest->walk;
  const auto groups = [&] {  // of 64 rows; nothing enters the first segment but the initial state
    const ChunkShape& shape = p.in.shape;
    const int64_t K = p.summary && !w.first ? pad64(shape.K) : 0;
    const int left = int(pad64(shape.V) + K - w.v0) / 64;
    return left < 0 ? 0 : left < F::kGroups ? left : F::kGroups;
  };
  if (threadIdx.x == 0) {
    w = walk_of<F::kC>(p.in, p.segments.chunks, blockIdx.x, fwd_tiles<F>(p), 64 * F::kGroups);
    if (groups() == 0 || (p.summary && w.last)) w.chunks = -1;
    if (w.chunks >= 0) shared.rest->pipe.init(128, 4 * groups());
  }
  __syncthreads();
  if (w.chunks < 0) return;
  const int group = int(threadIdx.x) / 128 - 1;
  if (group < 0) {
#if __CUDA_ARCH__ >= 900
    if constexpr (F::kAsync && F::kGroups == 2) registers_down<120>();
#endif
    Ahead<F>{p, maps, w, shared}.run();
  } else {
#if __CUDA_ARCH__ >= 900
    if constexpr (F::kAsync && F::kGroups == 2) registers_up<192>();
#endif
    if (group < groups()) StateGroup<F>{p, w, shared}.run();
  }
}

template <class F>
int64_t chunk_fwd_blocks(const ChunkFwdCuda& p) {
  const int64_t length = p.segments.chunks;
  return fwd_tiles<F>(p) * p.in.shape.HV * (length ? segment_slots(p.in, length) : p.in.N);
}
template <class F>
void chunk_fwd_launch(const ChunkFwdCuda& p, const typename F::Maps& maps, void* stream) {
  cudaFuncSetAttribute(chunk_fwd_kernel<F>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       F::kShared);
  chunk_fwd_kernel<F><<<unsigned(chunk_fwd_blocks<F>(p)), F::kThreads, F::kShared,
                        static_cast<cudaStream_t>(stream)>>>(p, maps);
}

// Two state warpgroups where registers and shared memory allow it, unless CTAs of one all fit:
// else two CTAs share the rows of V, and each makes the tables for itself.
template <class Arch, class E, int kK, bool kHigh>
void chunk_fwd_rows(const ChunkFwdCuda& p, const auto& maps, void* stream) {
  if constexpr (kK <= 128 && !(kHigh && kK == 128 && !Arch::kAsync)) {
    using Two = FwdConfig<Arch, E, kK, 2, kHigh>;
    if ((p.in.shape.V > 64 || p.summary) && 2 * chunk_fwd_blocks<Two>(p) > p.sms)
      return chunk_fwd_launch<Two>(p, maps, stream);
  }
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
  if (e == cudaSuccess) e = make_tensor_map(&maps.inverse, tma_inverse(p.in, p.inverse), 64);
  if (e == cudaSuccess) chunk_fwd_dispatch<Sm90, E>(p, maps, stream);
  return e;
}
}  // namespace df::cuda
