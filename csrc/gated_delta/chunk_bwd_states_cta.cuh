// What one CTA of chunk_bwd_states.cuh works on, its shared memory, and how chunks get there.
#pragma once
#include "common/cuda/mma_sm80.cuh"
#include "common/cuda/mma_sm90.cuh"
#include "gated_delta/chunk_bwd_cuda.h"
#include "gated_delta/chunk_pipeline.cuh"
#include "gated_delta/chunk_tma.h"

namespace df::cuda {
// Of the tokens of a chunk, for the columns of the state warpgroups' products.
template <int kC>
struct alignas(16) StatesFactors {
  float q[kC];  // sc gam r_q
  float k[kC];  // beta del r_k
  float w[kC];  // -gam r_k
  float decay;  // e^{G_C}
};

template <bool kAsync>
struct StatesMaps {};
template <>
struct StatesMaps<true> {
  CUtensorMap q, k, d_o, inverse;
};

template <class E_, int kK_>
struct StatesCta {
  using E = E_;
  static constexpr int kC = sizeof(E) == 2 ? 64 : 32, kK = kK_;
  static constexpr int kParts = sizeof(E) == 2 ? 2 : 1;                 // of T'
  static constexpr int kMaxGroups = kK * int(sizeof(E)) > 256 ? 1 : 2;  // state warpgroups
  static constexpr int kThreads = 128 * (kMaxGroups + 1);  // and one that prepares chunks
  using Keys = Tile<E, kC, kK>;
  using Values = Tile<E, kC, 64>;
  using Square = Tile<E, kC, kC>;
  using Factors = StatesFactors<kC>;
  static constexpr int kTiles = 2 * Keys::kBytes + (kParts + 1) * Square::kBytes;

  struct Stage {
    Keys q, k;
    Square inverse[kParts], P;
    uint32_t values;
    __device__ Values d_o(int group) const { return {values + group * Values::kBytes}; }
  };

  const ChunkBwdCuda& p;
  int groups, stages;
  char* memory;  // tiles of all stages, factors of all stages, table, walk, barriers

  static constexpr int stage_bytes(int groups) { return kTiles + groups * Values::kBytes; }
  static constexpr int bytes(int groups, int stages) {
    return stages * (stage_bytes(groups) + int(sizeof(Factors)) + 3 * 8) +
           int(sizeof(TokenTable<kC>) + sizeof(Walk));
  }

  __device__ Stage stage(int i) const {
    // whole units of 1024 bytes, which the compiler cannot know
    uint32_t at = (shared_address(memory) + i * stage_bytes(groups)) & ~1023u;
    const auto take = [&](int bytes) { return at += bytes, at - bytes; };
    Stage s;
    s.q.base = take(Keys::kBytes), s.k.base = take(Keys::kBytes);
#pragma unroll
    for (int part = 0; part < kParts; ++part) s.inverse[part].base = take(Square::kBytes);
    s.P.base = take(Square::kBytes), s.values = at;
    return s;
  }
  __device__ Factors& factors(int i) const {
    return reinterpret_cast<Factors*>(memory + stages * stage_bytes(groups))[i];
  }
  __device__ TokenTable<kC>& tokens() const {
    return *reinterpret_cast<TokenTable<kC>*>(&factors(stages));
  }
  __device__ Walk& walk() const { return *reinterpret_cast<Walk*>(&tokens() + 1); }
  // loaded: the tiles have arrived; ready: P and factors, too; empty: nobody reads any more
  __device__ uint64_t* loaded(int i) const { return reinterpret_cast<uint64_t*>(&walk() + 1) + i; }
  __device__ uint64_t* ready(int i) const { return loaded(stages + i); }
  __device__ uint64_t* empty(int i) const { return loaded(2 * stages + i); }

  __device__ int64_t first(int chunk) const { return walk().sequence.begin + int64_t(chunk) * kC; }
  __device__ int rows(int chunk) const { return walk().template rows<kC>(chunk); }
  __device__ Place keys(int chunk) const {
    return {walk().sequence.batch, first(chunk), walk().key_head, rows(chunk), 0,
            int(p.in.shape.K)};
  }
  __device__ Place values(int chunk, int group) const {
    const int v0 = walk().v0 + 64 * group;
    return {walk().sequence.batch, first(chunk), walk().head,
            rows(chunk),           v0,           int(p.in.shape.V) - v0};
  }
  // of one of the arrays by slot and head
  __device__ E* kept(const BySlot& x, int chunk) const {
    return static_cast<E*>(x.data) + (walk().sequence.slot + chunk) * x.slot + walk().head * x.head;
  }
};

// Stages are used in turn; `phase` is the parity of their barriers.
struct StatesRing {
  int stages, stage = 0, phase = 0;
  __device__ void next() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

// The tiles of a chunk: by TMA, by one thread (rows behind the sequence then hold what follows), or
// by 128.
template <class C>
__device__ inline void load_stage(const C& c, const StatesMaps<true>& maps, int chunk, int i) {
#if __CUDA_ARCH__ >= 900
  const auto stage = c.stage(i);
  const int slot = c.walk().sequence.slot + chunk, head = c.walk().head;
  uint64_t* const loaded = c.loaded(i);
  mbarrier_arrive_expect(loaded, c.stage_bytes(c.groups) - C::Square::kBytes);
  load_rows_tma(stage.q, 0, maps.q, c.keys(chunk), loaded);
  load_rows_tma(stage.k, 0, maps.k, c.keys(chunk), loaded);
#pragma unroll
  for (int part = 0; part < C::kParts; ++part)
    tma_load(stage.inverse[part].base, &maps.inverse, loaded, 0, head, C::kC * part, slot);
  for (int group = 0; group < c.groups; ++group)
    load_rows_tma(stage.d_o(group), 0, maps.d_o, c.values(chunk, group), loaded);
#endif
}
template <class C>
__device__ inline void load_stage(const C& c, bool vectors, int chunk, int i, int thread) {
  const auto stage = c.stage(i);
  load_rows<128>(stage.q, c.p.in.q, c.keys(chunk), vectors, thread);
  load_rows<128>(stage.k, c.p.in.k, c.keys(chunk), vectors, thread);
#pragma unroll
  for (int part = 0; part < C::kParts; ++part)
    load_tile<true, 128>(stage.inverse[part], c.kept(c.p.inverse, chunk) + part * C::kC * C::kC,
                         C::kC, C::kC, C::kC, thread);
  for (int group = 0; group < c.groups; ++group)
    load_rows<128>(stage.d_o(group), c.p.d_o, c.values(chunk, group), vectors, thread);
}
}  // namespace df::cuda
