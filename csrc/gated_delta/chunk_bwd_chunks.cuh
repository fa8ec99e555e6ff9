// Backward of the chunk form, everything but the chain of dS (gated_delta.md, 2.4 and 2.5). Of one
// chunk, with row scalings by gam, del, beta, 1 / |q|, 1 / |k| left out:
//   W = V - K S0     E = T' W     M = dW E^T     N = dO E^T                    (C x V, C x C)
//   dP = Gam o N diag(beta)       dKK = -Gam o strictlower(M) diag(beta)
//   dQ += dO S0^T + dP K          dK += E dS^T - dW S0^T + dP^T Q + (dKK + dKK^T) K
// dU is never formed: dbeta_i = E_i . dU_i - sum_j L_ji M_ji is the column sum of Gam o N o QK^T
// - L o M, plus k_i . (E dS^T)_i. The same two matrices, times diag(beta), are Z of the rectangle
// form of dg, whose column sums from row t on are thus sums for both.
//
// CTA = (slot, q/k head), all value heads of the group one after the other, tiles of 64 columns of
// V one after the other: dQ and dK stay in registers from the first to the last and are rounded
// once. Two groups of warps, C rows each, do the same with other operands:
//   queries: W, E; a = dO, square = N, gram = QK^T, d = dQ
//   keys:    <S0, dS>; a = dW, square = M, gram = KK^T, d = dK
// 16 bits: C = 64, a group is a warpgroup. float32: C = 32, the two are the halves of one
// warpgroup, whose tiles are rebased so that its warps 2 and 3 meet rows 0 to 31 (`own`).
// Phases of a tile of V, a barrier after each; a buffer is filled again when its last reader is
// through, and the copy has the time until its next reader:
//   1 queries: W = V - gam K S0, X = dO S0^T       keys: Y = -gam dW S0^T
//   2 queries: E = T' W                            keys: <S0, dS>
//     -> S0, V, dO, dW of the next tile
//   3 square += a E^T                              keys: E dS^T
//     -> dS of the next tile
// and once a head: dP and dKK (over T'), products with K and Q, sums for dg and dbeta.
// Shared bytes, 16 bits: 48 KB + 512 K + 7 KB (K = 128: 119 KB); K = 256 on mma.sync lets S0 and
// dS take turns in one buffer, 120 KB + 32 KB. float32: 24 KB + 512 K + 4 KB.
// Registers: K / 2 of dQ or dK, 32 each of gram, square and a product in flight; for K > 128 gram
// is computed again for each head. One CTA an SM.
// Per chunk and head at K = V = 128: 8.9 MFLOP * 2, 128 KB + 64 KB a group: bound by memory.
#pragma once
#include "common/cuda/mma_sm80.cuh"
#include "gated_delta/chunk_bwd_cuda.h"
#include "gated_delta/chunk_device.cuh"

namespace df::cuda {
template <class Arch_, class E_, int kK_>
struct ChunkGradConfig {
  using Arch = Arch_;
  using E = E_;
  static constexpr int kK = kK_, kC = sizeof(E) == 2 ? 64 : 32, kV = kC;
  static constexpr int kGroupThreads = 2 * kC, kThreads = 2 * kGroupThreads;
  static constexpr int kWarps = kC / 16;                              // of a group
  static constexpr int kPanel = !Arch::kAsync && kK > 128 ? 32 : 64;  // of K, in one product
  static constexpr bool kOneState = !Arch::kAsync && sizeof(E) == 2 && kK == 256;
  using KeyTile = Tile<E, kC, kK>;
  using StateTile = Tile<E, kV, kK>;
  using SquareTile = Tile<E, kC, kC>;  // C x C, and C x one tile of V
};

// Where rows of a chunk come from: rows t and heads h elements apart.
struct ChunkRows {
  const void* first;  // of head 0
  int64_t t, h;
  int64_t vectors;  // whether they can be copied by whole 16 bytes
};

// What the CTA works on, prepared once: in shared memory, since registers are rare.
struct alignas(16) ChunkGradPlace {
  ChunkRows v, dO, dW;
  ChunkRows states, dstates, inverse;  // h only
  int64_t first;                       // token
  int slot, key_head, batch, rows;
  uint32_t tiles, zero;  // where the tiles are; 0
};

template <class C>
struct ChunkGradScalars {
  ChunkGradPlace place;
  TokenTable<C::kC> table[2];          // of this head and the next; the norms in the first
  float columns[2][C::kWarps][C::kC];  // sums over a warp's rows, of queries and keys
  float rectangle[2][C::kC];           // sum_{i>=t>j} Z_ij, their parts
  float rho[C::kC], kap[C::kC];        // kap without beta
  float inner[C::kWarps];              // <S0, dS> by warp
};

// The tiles, one after the other in shared memory, and the scalars behind them.
template <class C>
struct ChunkGradTiles {
  using KeyTile = typename C::KeyTile;
  using StateTile = typename C::StateTile;
  using SquareTile = typename C::SquareTile;
  static constexpr int kState = 2 * KeyTile::kBytes;
  static constexpr int kSquare = kState + (C::kOneState ? 1 : 2) * StateTile::kBytes;
  static constexpr int kScalars = kSquare + 6 * SquareTile::kBytes;
  static constexpr int kGram = kScalars + int(sizeof(ChunkGradScalars<C>) + 15) / 16 * 16;
  static constexpr int kGramBytes = C::kThreads * C::kC * 2;  // accumulators, 16 bytes a thread
  static constexpr int kLimit = (C::Arch::kAsync ? 227 : 163) * 1024;
  static constexpr bool kKeepsGram = kGram + kGramBytes <= kLimit;
  static constexpr int kBytes = kGram + (kKeepsGram ? kGramBytes : 0);
  static_assert(kBytes <= kLimit);
  uint32_t base;

  __device__ KeyTile key(int i) const { return {base + i * KeyTile::kBytes}; }  // q, k: as given
  __device__ StateTile s() const { return {base + kState}; }                    // S0^T
  __device__ StateTile ds() const {                                             // dS^T
    return {base + kState + (C::kOneState ? 0 : StateTile::kBytes)};
  }
  // T' and what its rounding left; after their last use dP and dKK
  __device__ SquareTile square(int i) const { return {base + kSquare + i * SquareTile::kBytes}; }
  __device__ SquareTile a(int i) const { return square(2 + i); }  // dO, dW
  __device__ SquareTile v() const { return square(4); }
  __device__ SquareTile w() const { return square(5); }  // W, then E
};

// The two neighbouring elements of this lane in rows `row` and 8 columns 8 n of a tile, as in an
// accumulator; `first` is where n = 0 stands. The unit of 16 bytes is changed behind the swizzle.
template <class T>
__device__ inline uint32_t pair_address(uint32_t first, int n) {
  constexpr int kBytes = 8 * int(sizeof(typename T::E)), kPerPanel = 128 / kBytes;
  return (first ^ uint32_t(n % kPerPanel * kBytes)) + uint32_t(n / kPerPanel * T::kRows * 128);
}
template <class T>
__device__ inline float2 load_pair_of(uint32_t first, int n) {
  using E = typename T::E;
  if constexpr (sizeof(E) == 2) {
    uint32_t both;
    asm volatile("ld.shared.b32 %0, [%1];"
                 : "=r"(both)
                 : "r"(pair_address<T>(first, n))
                 : "memory");
    return unpack<E>(both);
  } else {
    return sm80::load_two(pair_address<T>(first, n));
  }
}
template <class T>
__device__ inline void store_pair_of(uint32_t first, int n, float x, float y) {
  using E = typename T::E;
  const uint32_t to = pair_address<T>(first, n);
  if constexpr (sizeof(E) == 2)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(pack<E>(x, y)) : "memory");
  else
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}
__device__ inline uint4 load_unit(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}
template <class E>
__device__ inline float dot_words(uint32_t x, uint32_t y) {
  if constexpr (sizeof(E) == 2) {
    const float2 a = unpack<E>(x), b = unpack<E>(y);
    return a.x * b.x + a.y * b.y;
  } else {
    return __uint_as_float(x) * __uint_as_float(y);
  }
}

// The rows g of a fragment times factor[0], g + 8 times factor[1].
template <int kN, class E>
__device__ inline void scale_fragment(Fragment<E, kN>& a, const float (&factor)[2]) {
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int k = 0; k < kN / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 x = unpack<E>(a.r[k][i]);
        a.r[k][i] = pack<E>(x.x * factor[i % 2], x.y * factor[i % 2]);
      }
  } else {
#pragma unroll
    for (int k = 0; k < kN / 8; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) a.r[k][i] *= factor[i / 2];
  }
}

// A thread's view of the CTA's chunk.
template <class C>
struct ChunkGrads {
  using Arch = typename C::Arch;
  using E = typename C::E;
  static constexpr int kK = C::kK, kC = C::kC, kV = C::kV;
  static constexpr int kUnit = 16 / int(sizeof(E));

  const ChunkBwdCuda& p;
  ChunkGradTiles<C> tiles;
  ChunkGradScalars<C>& scalars;
  int role;    // 0 queries, 1 keys
  int thread;  // of the group

  __device__ ChunkGrads(const ChunkBwdCuda& p, char* shared)
      : p(p),
        tiles{shared_address(shared)},
        scalars(*reinterpret_cast<ChunkGradScalars<C>*>(shared + ChunkGradTiles<C>::kScalars)),
        role(__shfl_sync(0xffffffffu, int(threadIdx.x) / C::kGroupThreads, 0)),
        thread(threadIdx.x % C::kGroupThreads) {}

  // Reads from memory again where addresses come from, so that they are computed anew in every
  // phase: the compiler would keep dozens of them in registers from one to the next.
  __device__ void forget() {
    uint32_t zero;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(tiles.base), "=r"(zero)
                 : "r"(shared_address(&scalars.place.tiles))
                 : "memory");
    thread = int(threadIdx.x % C::kGroupThreads + zero);
  }
  template <class T>
  __device__ uint32_t pairs(const T& tile, int half) const {  // for pair_address
    return tile.at(row(half), thread % 4 * 2);
  }
  __device__ int warp() const { return thread / 32; }
  // where this thread's elements of an accumulator stand
  __device__ int row(int half) const { return thread / 32 * 16 + thread % 32 / 4 + 8 * half; }
  __device__ int column(int n, int i) const { return 8 * n + thread % 4 * 2 + i % 2; }

  // A tile as this group's fragment functions must be handed it.
  template <class T>
  __device__ T own(const T& tile) const {
    return {tile.base - uint32_t(kC == 32 ? role * 32 * 128 : 0)};
  }
  __device__ static void barrier() { named_barrier_sync(0, C::kThreads); }
  __device__ void group_barrier() const { named_barrier_sync(1 + role, C::kGroupThreads); }

  // ---- what the copies start from
  __device__ ChunkRows rows_of(const Input& x, int64_t size) const {
    const ChunkGradPlace& at = scalars.place;
    const E* first = static_cast<const E*>(x.data) + offset(x, at.batch, at.first, 0);
    const bool whole = reinterpret_cast<uintptr_t>(first) % 16 == 0 && x.t % kUnit == 0 &&
                       x.h % kUnit == 0 && size % kUnit == 0;
    return {first, x.t, x.h, whole};
  }
  __device__ static ChunkRows rows_of(const BySlot& x, int slot) {
    return {static_cast<const E*>(x.data) + slot * x.slot, 0, x.head, true};
  }
  __device__ void prepare(const ChunkPlace& of, int slot, int key_head) const {  // by one thread
    const ChunkShape& s = p.in.shape;
    ChunkGradPlace& place = scalars.place;
    place.first = of.sequence.begin + of.chunk * kC;
    place.slot = slot, place.key_head = key_head;
    place.batch = int(of.sequence.batch), place.rows = of.rows, place.tiles = tiles.base,
    place.zero = 0;
    const Input dW{p.dv, p.in.v.dtype, s.T * s.HV * s.V, s.HV * s.V, s.V};
    place.v = rows_of(p.in.v, s.V), place.dO = rows_of(p.d_o, s.V), place.dW = rows_of(dW, s.V);
    place.states = rows_of(p.states, slot), place.dstates = rows_of(p.dstates, slot);
    place.inverse = rows_of(p.inverse, slot);
  }

  // ---- copies, by all threads
  __device__ int all_threads() const { return role * C::kGroupThreads + thread; }
  // Rows of one head; `x` as it is, or a tile of columns of V from `col` on.
  template <class T>
  __device__ void load_rows(const T& tile, const ChunkRows& x, int head, int64_t col,
                            int64_t size) const {
    const E* from = static_cast<const E*>(x.first) + head * x.h + col;
    const int cols = int(size - col);
    if (x.vectors)
      load_tile<true, C::kThreads>(tile, from, x.t, scalars.place.rows, cols, all_threads());
    else
      load_tile<false, C::kThreads>(tile, from, x.t, scalars.place.rows, cols, all_threads());
  }
  __device__ static const E* of_head(const ChunkRows& x, int head) {
    return static_cast<const E*>(x.first) + head * x.h;
  }
  __device__ void load_state(const typename C::StateTile& tile, const ChunkRows& x, int head,
                             int v0) const {
    load_tile<true, C::kThreads>(tile, of_head(x, head) + v0 * kK, kK, kV, kK, all_threads());
  }
  __device__ void load_entering(int head, int v0) const {  // S0, V, dO, dW
    const ChunkGradPlace& place = scalars.place;
    load_state(tiles.s(), place.states, head, v0);
    load_rows(tiles.v(), place.v, head, v0, p.in.shape.V);
    load_rows(tiles.a(0), place.dO, head, v0, p.in.shape.V);
    load_rows(tiles.a(1), place.dW, head, v0, p.in.shape.V);
  }
  __device__ void load_leaving(int head, int v0) const {
    load_state(tiles.ds(), scalars.place.dstates, head, v0);
  }
  __device__ void load_inverse(int head) const {
    const E* from = of_head(scalars.place.inverse, head);
    load_tile<true, C::kThreads>(tiles.square(0), from, kC, kC, kC, all_threads());
    if constexpr (sizeof(E) == 2)
      load_tile<true, C::kThreads>(tiles.square(1), from + kC * kC, kC, kC, kC, all_threads());
  }
  __device__ void load_table(int head) const {  // by one warp
    const ChunkGradPlace at = scalars.place;
    load_tokens(p.in, at.batch, at.first, at.rows, head, scalars.table[head % 2]);
  }
  template <int kLeft>
  __device__ static void arrive() {  // all but the last kLeft groups of copies are visible to all
    cp_async_wait<kLeft>();
    Arch::stores_visible();
    barrier();
  }

  // ---- phases of a tile of V
  // d += factor o (a S^T) with S^T of `state`; dots += rows of a S^T times those of `key`. For
  // K > 128 there are no registers for a as a fragment.
  __device__ void read_state(const typename C::SquareTile& from, const typename C::StateTile& state,
                             const typename C::KeyTile& key, const float (&factor)[2],
                             float (&dots)[2], float (&d)[kK / 8][4]) const {
    Fragment<E, kV> a;
    if constexpr (kK <= 128) load_fragment<kV>(a, own(from).along_k());
#pragma unroll
    for (int k0 = 0; k0 < kK; k0 += C::kPanel) {
      Accumulator<C::kPanel> x;
      clear<C::kPanel>(x);
      if constexpr (kK <= 128) {
        Arch::begin(x, a);
        Arch::template mma<C::kPanel, kV>(x, a, state.along_mn().from(0, k0));
        Arch::commit();
        Arch::template wait<0>(x, a);
      } else {
        Arch::begin(x);
        Arch::template mma<C::kPanel, kV>(x, own(from).along_k(), state.along_mn().from(0, k0));
        Arch::commit();
        Arch::template wait<0>(x);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t at = pairs(key, half);
#pragma unroll
        for (int n = 0; n < C::kPanel / 8; ++n) {
          const float2 y = load_pair_of<typename C::KeyTile>(at, k0 / 8 + n);
          const float x0 = x[n][2 * half], x1 = x[n][2 * half + 1];
          dots[half] += y.x * x0 + y.y * x1;
          d[k0 / 8 + n][2 * half] += factor[half] * x0;
          d[k0 / 8 + n][2 * half + 1] += factor[half] * x1;
        }
      }
    }
  }

  // W = V - gam o K S0 into w; dots += rows of K S0 times those of dW.
  __device__ void residuals(const TokenTable<kC>& t, float (&dots)[2]) const {
    Accumulator<kV> x;
    clear<kV>(x);
    Arch::begin(x);
    Arch::template mma<kV, kK>(x, tiles.key(1).along_k(), tiles.s().along_k());
    Arch::commit();
    Arch::template wait<0>(x);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float factor = t.gam[row(half)] * scalars.table[0].rk[row(half)];
      const uint32_t at_v = pairs(tiles.v(), half), at_dW = pairs(tiles.a(1), half);
      const uint32_t at_w = pairs(tiles.w(), half);
#pragma unroll
      for (int n = 0; n < kV / 8; ++n) {
        const float x0 = x[n][2 * half], x1 = x[n][2 * half + 1];
        const float2 v = load_pair_of<typename C::SquareTile>(at_v, n);
        const float2 dW = load_pair_of<typename C::SquareTile>(at_dW, n);
        dots[half] += x0 * dW.x + x1 * dW.y;
        store_pair_of<typename C::SquareTile>(at_w, n, v.x - factor * x0, v.y - factor * x1);
      }
    }
  }

  __device__ void errors() const {  // E = T' W, in the place of W
    Accumulator<kV> e;
    clear<kV>(e);
    Arch::begin(e);
    Arch::template mma<kV, kC>(e, tiles.square(0).along_k(), tiles.w().along_mn());
    if constexpr (sizeof(E) == 2)
      Arch::template mma<kV, kC>(e, tiles.square(1).along_k(), tiles.w().along_mn());
    Arch::commit();
    Arch::template wait<0>(e);
    group_barrier();  // W is read
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = pairs(tiles.w(), half);
#pragma unroll
      for (int n = 0; n < kV / 8; ++n)
        store_pair_of<typename C::SquareTile>(at, n, e[n][2 * half], e[n][2 * half + 1]);
    }
  }

  __device__ float inner_product(int head, int v0) const {
    constexpr int kUnits = kK / kUnit;
    const E* from = of_head(scalars.place.dstates, head) + v0 * kK;
    float sum = 0;
#pragma unroll 4
    for (int i = thread; i < kV * kUnits; i += C::kGroupThreads) {
      const int at = i / kUnits, col = i % kUnits * kUnit;
      const uint4 x = load_unit(tiles.s().at(at, col));
      const uint4 y = C::kOneState ? __ldcg(reinterpret_cast<const uint4*>(from + at * kK + col))
                                   : load_unit(tiles.ds().at(at, col));
      sum += (dot_words<E>(x.x, y.x) + dot_words<E>(x.y, y.y)) +
             (dot_words<E>(x.z, y.z) + dot_words<E>(x.w, y.w));
    }
    return sum;
  }

  // ---- QK^T or KK^T, not normed: once, into shared memory where it fits, else once a head
  __device__ uint32_t kept_gram(int n) const {
    return tiles.base + ChunkGradTiles<C>::kGram + (n * C::kThreads + all_threads()) * 16;
  }
  __device__ void make_gram(float (&gram)[kC / 8][4]) const {
    clear<kC>(gram);
    Arch::begin(gram);
    Arch::template mma<kC, kK>(gram, own(tiles.key(role)).along_k(), tiles.key(1).along_k());
    Arch::commit();
    Arch::template wait<0>(gram);
  }
  __device__ void keep_gram() const {
    Accumulator<kC> gram;
    make_gram(gram);
#pragma unroll
    for (int n = 0; n < kC / 8; ++n)
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(kept_gram(n)), "f"(gram[n][0]),
                   "f"(gram[n][1]), "f"(gram[n][2]), "f"(gram[n][3])
                   : "memory");
  }
  __device__ void load_gram(float (&gram)[kC / 8][4]) const {
    if constexpr (ChunkGradTiles<C>::kKeepsGram) {
#pragma unroll
      for (int n = 0; n < kC / 8; ++n) {
        const uint4 x = load_unit(kept_gram(n));
        gram[n][0] = __uint_as_float(x.x), gram[n][1] = __uint_as_float(x.y);
        gram[n][2] = __uint_as_float(x.z), gram[n][3] = __uint_as_float(x.w);
      }
    } else {
      make_gram(gram);
    }
  }

  // ---- once a head
  // From N or M to dP or dKK: their part of d, square K; in the place of T' for the products with
  // the transpose; in `gram` without beta, times gram.
  __device__ void square_gradients(const TokenTable<kC>& t, float (&square)[kC / 8][4],
                                   float (&gram)[kC / 8][4], float (&d)[kK / 8][4]) const {
    const TokenTable<kC>& norms = scalars.table[0];
    const float factor = role ? -1.0f : p.in.scale;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row(half);
      const float norm = role ? norms.rk[r] : norms.rq[r];
      const uint32_t at = pairs(tiles.square(role), half);
#pragma unroll
      for (int n = 0; n < kC / 8; ++n) {
        float stored[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int col = column(n, i);
          const bool lower = col <= r - role;
          float &x = square[n][2 * half + i], &y = gram[n][2 * half + i];
          x = lower ? factor * t.decay(r, col) * x : 0.0f;
          y = lower ? x * y * (norm * norms.rk[col]) : 0.0f;
          x *= t.beta[col];
          stored[i] = x * norm;
          x *= norms.rk[col];
        }
        store_pair_of<typename C::SquareTile>(at, n, stored[0], stored[1]);
      }
    }
    Fragment<E, kC> a;
    to_fragment<E, kC>(square, a);
    Arch::begin(d, a);
    Arch::template mma<kK, kC>(d, a, tiles.key(1).along_mn());
    Arch::commit();
    Arch::template wait<0>(d, a);
  }
  __device__ void add_columns_of_keys(float (&d)[kK / 8][4]) const {  // dP^T Q + dKK^T K
    Arch::begin(d);
    Arch::template mma<kK, kC>(d, own(tiles.square(0)).along_mn(), tiles.key(0).along_mn());
    Arch::template mma<kK, kC>(d, own(tiles.square(1)).along_mn(), tiles.key(1).along_mn());
    Arch::commit();
    Arch::template wait<0>(d);
  }

  // Column sums of x over rows from t on, for all t; their part left of t, times beta, summed to
  // `rectangle`. What x holds on the diagonal reaches the column sums only.
  __device__ void rectangle_sums(const TokenTable<kC>& t, float (&x)[kC / 8][4]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kC / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float upper = x[n][i], below = x[n][i + 2];
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          const float next = __shfl_down_sync(0xffffffffu, upper, step);
          const float next_below = __shfl_down_sync(0xffffffffu, below, step);
          if (lane + step < 32) upper += next, below += next_below;
        }
        upper += __shfl_sync(0xffffffffu, below, lane % 4);
        if (lane < 4) scalars.columns[role][warp()][column(n, i)] = upper;
        x[n][i] = upper, x[n][i + 2] = below;
      }
    group_barrier();
#pragma unroll
    for (int w = 1; w < C::kWarps; ++w) {
      if (w <= warp()) continue;
#pragma unroll
      for (int n = 0; n < kC / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] += scalars.columns[role][w][column(n, i)];
    }
    float sums[2] = {0, 0};
#pragma unroll
    for (int n = 0; n < kC / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int col = column(n, i);
        if (col < row(i / 2)) sums[i / 2] += t.beta[col] * x[n][i];
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = lane_sum<4>(sums[half]);
      if (lane % 4 == 0) scalars.rectangle[role][row(half)] = sum;
    }
  }

  // rho = q . X + k . Y of the queries' dots, or kap = k . (E dS^T) of the keys'; <S0, dS>.
  __device__ void row_sums(const TokenTable<kC>& t, const float (&key_dots)[2],
                           const float (&value_dots)[2], float inner) const {
    const TokenTable<kC>& norms = scalars.table[0];
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row(half);
      const float x = lane_sum<4>(key_dots[half]), y = lane_sum<4>(value_dots[half]);
      if (lane % 4) continue;
      if (role)
        scalars.kap[r] = t.del[r] * norms.rk[r] * x;
      else
        scalars.rho[r] = t.gam[r] * (p.in.scale * norms.rq[r] * x - norms.rk[r] * y);
    }
    inner = lane_sum<32>(inner);
    if (role && lane == 0) scalars.inner[warp()] = inner;
  }

  // dg_t = e^{G_C} <dS, S0> + sum_{j<t} kap_j + sum_{i>=t} rho_i + sum_{i>=t>j} Z_ij, dbeta, and
  // both through gate and sigmoid; by one warp.
  __device__ void scalar_gradients(const TokenTable<kC>& t, int head) const {
    const ChunkGradPlace place = scalars.place;
    const HeadGate gate = head_gate(p.in.pre, head);
    const float scale = float(p.in.pre.sigmoid_scale);
    const int lane = threadIdx.x % 32;
    float inner = 0, before = 0, after = 0, kap[kC / 32], rho[kC / 32];
    for (int w = 0; w < C::kWarps; ++w) inner += scalars.inner[w];
#pragma unroll
    for (int part = 0; part < kC / 32; ++part) {  // running sums: kap without the token itself
      const float x = scalars.kap[part * 32 + lane] * t.beta[part * 32 + lane];
      float sum = x;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
      }
      const float previous = __shfl_up_sync(0xffffffffu, sum, 1);
      kap[part] = before + (lane ? previous : 0);
      before += __shfl_sync(0xffffffffu, sum, 31);
    }
#pragma unroll
    for (int part = kC / 32 - 1; part >= 0; --part) {
      float sum = scalars.rho[part * 32 + lane];
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_down_sync(0xffffffffu, sum, step);
        if (lane + step < 32) sum += other;
      }
      rho[part] = after + sum;
      after += __shfl_sync(0xffffffffu, sum, 0);
    }
    float sums[2] = {0, 0};
#pragma unroll
    for (int part = 0; part < kC / 32; ++part) {
      const int i = part * 32 + lane;
      if (i >= place.rows) continue;
      const Token x = load_token(p.in, gate, place.batch, place.first + i, head);
      float dg = t.chunk_decay * inner + kap[part] + rho[part] +
                 (scalars.rectangle[0][i] + scalars.rectangle[1][i]);
      float dbeta = scalars.kap[i];
      for (int w = 0; w < C::kWarps; ++w)
        dbeta += scalars.columns[0][w][i] + scalars.columns[1][w][i];
      const bool clamped = x.g < kMinGate;
      if (clamped) dg = 0;
      if (gate.fused) {
        sums[0] += dg * (clamped ? kMinGate : x.g);
        dg *= gate.rate * sigmoid(x.raw + gate.bias);
        sums[1] += dg;
      }
      if (scale > 0) dbeta *= x.beta * (1 - x.beta / scale);
      const int64_t at =
          (int64_t(place.batch) * p.in.shape.T + place.first + i) * p.in.shape.HV + head;
      p.dg[at] = dg, p.dbeta[at] = dbeta;
    }
    if (!p.dA_log) return;
    const float total[2] = {lane_sum<32>(sums[0]), lane_sum<32>(sums[1])};
    const int64_t at = int64_t(place.slot) * p.in.shape.HV + head;
    if (lane == 0) p.dA_log[at] = total[0];
    if (lane == 0 && p.ddt_bias) p.ddt_bias[at] = total[1];
  }

  // ---- at the end: dq or dk from that of the normed row, through its tile
  __device__ void store_keys(const float (&d)[kK / 8][4]) const {
    const typename C::KeyTile& tile = tiles.key(role);
    const TokenTable<kC>& norms = scalars.table[0];
    const ChunkShape& s = p.in.shape;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float r = role ? norms.rk[row(half)] : norms.rq[row(half)];
      const uint32_t at = pairs(tile, half);
      float along = 0;
#pragma unroll
      for (int n = 0; n < kK / 8; ++n) {
        const float2 x = load_pair_of<typename C::KeyTile>(at, n);
        along += x.x * d[n][2 * half] + x.y * d[n][2 * half + 1];
      }
      along = p.in.l2norm ? r * r * lane_sum<4>(along) : 0;
#pragma unroll
      for (int n = 0; n < kK / 8; ++n) {
        const float2 x = load_pair_of<typename C::KeyTile>(at, n);
        store_pair_of<typename C::KeyTile>(at, n, r * (d[n][2 * half] - x.x * along),
                                           r * (d[n][2 * half + 1] - x.y * along));
      }
    }
    group_barrier();
    const ChunkGradPlace place = scalars.place;
    E* to = static_cast<E*>(role ? p.dk : p.dq) +
            ((int64_t(place.batch) * s.T + place.first) * s.H + place.key_head) * s.K;
    constexpr int kUnits = kK / kUnit;
    for (int i = thread; i < place.rows * kUnits; i += C::kGroupThreads) {
      const int at = i / kUnits, col = i % kUnits * kUnit;
      if (col >= s.K) continue;
      const uint4 x = load_unit(tile.at(at, col));
      E* const there = to + at * s.H * s.K + col;
      if (s.K % kUnit == 0) {
        __stcg(reinterpret_cast<uint4*>(there), x);
      } else {
        const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
        for (int e = 0; e < kUnit; ++e) {
          if (col + e >= s.K) break;
          if constexpr (sizeof(E) == 2)
            there[e].bits = uint16_t(words[e / 2] >> e % 2 * 16);
          else
            there[e] = __uint_as_float(words[e]);
        }
      }
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    chunk_grads_kernel(const __grid_constant__ ChunkBwdCuda p) {
  using Arch = typename C::Arch;
  using E = typename C::E;
  extern __shared__ __align__(1024) char shared[];
  const ChunkShape& s = p.in.shape;
  const int H = int(s.H), slot = blockIdx.x / H, key_head = blockIdx.x % H, G = int(s.HV / s.H);
  const ChunkPlace place = chunk_place(p.in, slot);
  if (place.rows == 0) {
    for (int h = key_head * G + threadIdx.x; h < (key_head + 1) * G; h += C::kThreads) {
      if (p.dA_log) p.dA_log[int64_t(slot) * s.HV + h] = 0;
      if (p.ddt_bias) p.ddt_bias[int64_t(slot) * s.HV + h] = 0;
    }
    return;
  }
  ChunkGrads<C> my(p, shared);
  auto& tiles = my.tiles;
  auto& scalars = my.scalars;
  if (threadIdx.x == 0) my.prepare(place, slot, key_head);
  __syncthreads();

  int head = key_head * G;
  my.load_rows(tiles.key(0), my.rows_of(p.in.q, s.K), key_head, 0, s.K);
  my.load_rows(tiles.key(1), my.rows_of(p.in.k, s.K), key_head, 0, s.K);
  my.load_entering(head, 0);
  cp_async_commit();
  if (!C::kOneState) my.load_leaving(head, 0);
  cp_async_commit();
  my.load_inverse(head);
  cp_async_commit();
  if (threadIdx.x < 32) my.load_table(head);
  my.template arrive<2>();
  row_norms<C::kGroupThreads>(tiles.key(my.role), p.in.l2norm, my.thread,
                              my.role ? scalars.table[0].rk : scalars.table[0].rq);

  Accumulator<C::kK> d;
  clear<C::kK>(d);
  if constexpr (ChunkGradTiles<C>::kKeepsGram) my.keep_gram();

  for (const int end = head + G; head < end; ++head) {
    const TokenTable<C::kC>& t = scalars.table[head % 2];
    Accumulator<C::kC> square;
    clear<C::kC>(square);
    float key_dots[2] = {0, 0}, value_dots[2] = {0, 0}, inner = 0;
    for (int v0 = 0; v0 < s.V; v0 += C::kV) {
      const bool last = v0 + C::kV >= s.V, more = !last || head + 1 < end;
      const int next_head = last ? head + 1 : head;
      const int next_v0 = last ? 0 : v0 + C::kV;

      my.template arrive<2>();
      my.forget();
      if (my.role == 0) {
        my.residuals(t, value_dots);
        const float factor[2] = {p.in.scale * t.gam[my.row(0)], p.in.scale * t.gam[my.row(1)]};
        my.read_state(tiles.a(0), tiles.s(), tiles.key(0), factor, key_dots, d);
      } else {
        Fragment<E, C::kV> y;
        load_fragment<C::kV>(y, my.own(tiles.a(1)).along_k());
        scale_fragment<C::kV>(y, {-t.gam[my.row(0)], -t.gam[my.row(1)]});
        Arch::begin(d, y);
        Arch::template mma<C::kK, C::kV>(d, y, tiles.s().along_mn());
        Arch::commit();
        Arch::template wait<0>(d, y);
      }
      Fragment<E, C::kV> a;
      load_fragment<C::kV>(a, my.own(tiles.a(my.role)).along_k());

      my.template arrive<0>();
      my.forget();
      if (my.role == 0) {
        my.errors();
      } else {
        inner += my.inner_product(head, v0);
        if (v0 == 0 && my.warp() == 0 && head + 1 < end) my.load_table(head + 1);
      }
      Arch::stores_visible();
      my.barrier();
      if constexpr (C::kOneState) {
        my.load_leaving(head, v0);
        cp_async_commit();
        my.template arrive<0>();
      } else {
        if (more) my.load_entering(next_head, next_v0);
        cp_async_commit();
      }

      my.forget();
      Arch::begin(square, a);
      Arch::template mma<C::kC, C::kV>(square, a, tiles.w().along_k());
      Arch::commit();
      Arch::template wait<0>(square, a);
      if (my.role == 1) {
        const float factor[2] = {t.beta[my.row(0)] * t.del[my.row(0)],
                                 t.beta[my.row(1)] * t.del[my.row(1)]};
        my.read_state(tiles.w(), tiles.ds(), tiles.key(1), factor, key_dots, d);
      }
      my.barrier();
      if constexpr (C::kOneState) {
        if (more) my.load_entering(next_head, next_v0);
        cp_async_commit();
      } else if (more) {
        my.load_leaving(next_head, next_v0);
      }
      cp_async_commit();
      if (!last) cp_async_commit();  // of T', which stays
    }

    my.forget();
    Accumulator<C::kC> products;
    my.load_gram(products);
    my.square_gradients(t, square, products, d);
    Arch::stores_visible();
    my.barrier();
    my.forget();
    if (my.role == 1) my.add_columns_of_keys(d);
    my.rectangle_sums(t, products);
    my.row_sums(t, key_dots, value_dots, inner);
    my.barrier();
    if (head + 1 < end) my.load_inverse(head + 1);
    cp_async_commit();
    if (threadIdx.x < 32) my.scalar_gradients(t, head);
  }
  my.forget();
  my.store_keys(d);
}

template <class C>
int chunk_grads_launch(const ChunkBwdCuda& p, void* stream) {
  constexpr int kBytes = ChunkGradTiles<C>::kBytes;
  const cudaError_t e = cudaFuncSetAttribute(chunk_grads_kernel<C>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (e != cudaSuccess) return e;
  const unsigned grid = unsigned(p.in.slots() * p.in.shape.H);
  chunk_grads_kernel<C><<<grid, C::kThreads, kBytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaSuccess;
}

template <class Arch, class E>
int chunk_grads_dispatch(const ChunkBwdCuda& p, void* stream) {
  switch (pad64(p.in.shape.K)) {
    case 64: return chunk_grads_launch<ChunkGradConfig<Arch, E, 64>>(p, stream);
    case 128: return chunk_grads_launch<ChunkGradConfig<Arch, E, 128>>(p, stream);
    case 192: return chunk_grads_launch<ChunkGradConfig<Arch, E, 192>>(p, stream);
    default: return chunk_grads_launch<ChunkGradConfig<Arch, E, 256>>(p, stream);
  }
}
}  // namespace df::cuda
