// Shapes, stages and the shared memory of the forward's CTAs.
#pragma once
#include "common/cuda/mma_sm90.cuh"
#include "gated_delta/chunk_fwd_cuda.h"
#include "gated_delta/chunk_squares.cuh"

namespace df::cuda {
struct NoMaps {};
struct FwdMaps {
  CUtensorMap q, k, v, inverse;
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
  static constexpr bool kGiven = sizeof(E) == 2;  // T', which then comes with the tiles
  static constexpr int kStages =
      kAsync ? (kK > 128 || kHigh ? 2 : 3) : (sizeof(E) == 2 && kK > 128 ? 1 : 2);
  static constexpr int kTables = kStages < 2 ? kStages : 2;
  static constexpr int kThreads = 128 * (1 + kGroups);
  static constexpr int kAttention = kHigh ? 2 : 1;  // parts of P
  // Products that do not need each other side by side, where registers allow it. Not by kGroups: a
  // head's bits must not depend on how many there are.
  static constexpr bool kTogether = kAsync && kK <= 128 && !kHigh;

  // Tables of tokens are made by all warps ahead at once, a chunk each; floats: one at a time.
  static constexpr int kBatch = kGiven ? 4 : 1;
  static constexpr int kTokens = kGiven ? 2 * kBatch : kTables + 1;

  struct alignas(16) Rest {
    TokenTable<kC> tokens[kTokens];
    Pipeline<kStages, kTables> pipe;
    Walk walk;
  };
  static constexpr int kInverse = Work::kParts * Square::kBytes;
  static constexpr int kStageBytes = Keys::kBytes + Values::kBytes + (kGiven ? kInverse : 0);
  static constexpr int kTableBytes = (kGiven ? 0 : kInverse) + kAttention * Square::kBytes;
  static constexpr int kTiles = kStages * kStageBytes + kTables * kTableBytes;
  static constexpr int kShared = kTiles + int(sizeof(Rest));
  static_assert(kShared <= (kAsync ? 227 : 163) * 1024, "more than a CTA of that device may have");
};

template <class F>
struct FwdShared {
  uint32_t base;
  typename F::Rest* rest;
  __device__ explicit FwdShared(void* p)
      : base(shared_address(p) & ~1023u),  // which it is: for the compiler
        rest(reinterpret_cast<typename F::Rest*>(static_cast<char*>(p) + F::kTiles)) {}
  __device__ uint32_t stage(int chunk) const {
    return base + uint32_t(chunk) % F::kStages * F::kStageBytes;
  }
  __device__ typename F::Keys keys(int chunk) const { return {stage(chunk)}; }
  __device__ typename F::Values values(int chunk) const { return {stage(chunk) + F::Keys::kBytes}; }
  __device__ uint32_t table(int chunk) const {
    return base + F::kStages * F::kStageBytes + uint32_t(chunk) % F::kTables * F::kTableBytes;
  }
  __device__ uint32_t inverse(int chunk) const {
    return F::kGiven ? stage(chunk) + F::kStageBytes - F::kInverse : table(chunk);
  }
  __device__ uint32_t attention(int chunk) const {
    return table(chunk) + F::kTableBytes - F::kAttention * F::Square::kBytes;
  }
  __device__ TokenTable<F::kC>& tokens(int chunk) const {
    return rest->tokens[uint32_t(chunk) % F::kTokens];
  }
};
}  // namespace df::cuda
