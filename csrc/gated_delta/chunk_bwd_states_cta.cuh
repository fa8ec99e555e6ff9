// What one CTA of chunk_bwd_states.cuh works on, its shared memory, and how chunks get there.
#pragma once
#include "common/cuda/mma_sm80.cuh"
#include "common/cuda/mma_sm90.cuh"
#include "common/cuda/tma.h"
#include "gated_delta/chunk_bwd_cuda.h"
#include "gated_delta/chunk_device.cuh"

namespace df::cuda {
// Of the tokens of a chunk, for the columns of the state warpgroups' products.
template <int kC>
struct alignas(16) StatesFactors {
  float q[kC];  // sc gam r_q
  float k[kC];  // del r_k
  float w[kC];  // -gam r_k
  float beta[kC];
  float decay;  // e^{G_C}
};

template <bool kAsync>
struct StatesMaps {};
template <>
struct StatesMaps<true> {
  CUtensorMap q, k, d_o, inverse;
};

// Read from shared memory where it is wanted: registers are for the state.
struct StatesItem {    // V tiles of 64 columns, from v0 on, of one value head of one sequence
  int64_t begin, end;  // of the sequence, in row `batch`
  int batch, n, head, slot, chunks, v0;  // slot: of the first chunk
};

template <class E_, int kK_>
struct StatesCta {
  using E = E_;
  static constexpr int kC = sizeof(E) == 2 ? 64 : 32, kK = kK_;
  static constexpr int kParts = sizeof(E) == 2 ? 2 : 1;    // of T'
  static constexpr int kMaxGroups = kK > 128 ? 1 : 2;      // state warpgroups
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
  char* memory;  // tiles of all stages, factors of all stages, table, item, barriers

  static constexpr int stage_bytes(int groups) { return kTiles + groups * Values::kBytes; }
  static constexpr int bytes(int groups, int stages) {
    return stages * (stage_bytes(groups) + int(sizeof(Factors)) + 3 * 8) +
           int(sizeof(TokenTable<kC>) + sizeof(StatesItem));
  }

  __device__ Stage stage(int i) const {
    uint32_t at = shared_address(memory) + i * stage_bytes(groups);
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
  __device__ StatesItem& item() const { return *reinterpret_cast<StatesItem*>(&tokens() + 1); }
  // loaded: the tiles have arrived; ready: P and factors, too; empty: nobody reads any more
  __device__ uint64_t* loaded(int i) const { return reinterpret_cast<uint64_t*>(&item() + 1) + i; }
  __device__ uint64_t* ready(int i) const { return loaded(stages + i); }
  __device__ uint64_t* empty(int i) const { return loaded(2 * stages + i); }

  __device__ int64_t first(int chunk) const { return item().begin + chunk * kC; }
  __device__ int rows(int chunk) const {
    const int64_t left = item().end - first(chunk);
    return left < kC ? int(left) : kC;
  }
  // of one of the arrays by slot and head
  __device__ E* kept(const BySlot& x, int chunk) const {
    return static_cast<E*>(x.data) + (item().slot + chunk) * x.slot + item().head * x.head;
  }
};

// Stages are used in turn; `phase` is the parity of their barriers.
struct StatesRing {
  int stages, stage = 0, phase = 0;
  __device__ void next() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

template <class T>
__device__ inline void zero_rows(const T& tile, int rows, int thread) {
  constexpr int kUnit = 16 / int(sizeof(typename T::E)), kUnits = T::kCols / kUnit;
  for (int i = rows * kUnits + thread; i < T::kRows * kUnits; i += 128)
    asm volatile(
        "st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(tile.at(i / kUnits, i % kUnits * kUnit)),
        "r"(0)
        : "memory");
}

// The tiles of a chunk by TMA, issued by one thread. Rows behind the sequence hold what follows.
template <class C>
__device__ inline void load_stage(const C& c, const StatesMaps<true>& maps, int chunk, int i) {
#if __CUDA_ARCH__ >= 900
  const auto stage = c.stage(i);
  const int head = c.item().head, key_head = head / int(c.p.in.shape.HV / c.p.in.shape.H);
  const int token = int(c.first(chunk)), batch = c.item().batch, slot = c.item().slot + chunk;
  uint64_t* loaded = c.loaded(i);
  mbarrier_arrive_expect(loaded, c.stage_bytes(c.groups) - C::Square::kBytes);
#pragma unroll
  for (int col = 0; col < C::kK; col += 64) {
    tma_load(stage.q.at(0, col), &maps.q, loaded, col, key_head, token, batch);
    tma_load(stage.k.at(0, col), &maps.k, loaded, col, key_head, token, batch);
  }
#pragma unroll
  for (int part = 0; part < C::kParts; ++part)
    tma_load(stage.inverse[part].base, &maps.inverse, loaded, 0, head, C::kC * part, slot);
  for (int group = 0; group < c.groups; ++group)
    tma_load(stage.d_o(group).base, &maps.d_o, loaded, c.item().v0 + 64 * group, head, token,
             batch);
#endif
}

// The same by 128 threads, with cp.async where kVectors.
template <bool kVectors, class C>
__device__ inline void load_stage(const C& c, int chunk, int i, int thread) {
  using E = typename C::E;
  const auto stage = c.stage(i);
  const ChunkCuda& in = c.p.in;
  const int rows = c.rows(chunk), K = int(in.shape.K), V = int(in.shape.V);
  const auto at = [&](const Input& x, int64_t head) {
    return static_cast<const E*>(x.data) + offset(x, c.item().batch, c.first(chunk), head);
  };
  const int key_head = c.item().head / int(in.shape.HV / in.shape.H);
  load_tile<kVectors, 128>(stage.q, at(in.q, key_head), in.q.t, rows, K, thread);
  load_tile<kVectors, 128>(stage.k, at(in.k, key_head), in.k.t, rows, K, thread);
  const E* const inverse = c.kept(c.p.inverse, chunk);
#pragma unroll
  for (int part = 0; part < C::kParts; ++part)
    load_tile<kVectors, 128>(stage.inverse[part], inverse + part * C::kC * C::kC, C::kC, C::kC,
                             C::kC, thread);
  for (int group = 0; group < c.groups; ++group) {
    const int v0 = c.item().v0 + 64 * group;
    load_tile<kVectors, 128>(stage.d_o(group), at(c.p.d_o, c.item().head) + v0, c.p.d_o.t, rows,
                             V - v0, thread);
  }
}
}  // namespace df::cuda
