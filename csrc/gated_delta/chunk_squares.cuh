// The C x C matrices of a chunk, by one warpgroup: from its token table and the tile [K; Q]
//   A = strictlower(Gam o KK^T) diag(beta)     T' = (I + A)^-1     P = lower(Gam o QK^T)
// l2norm enters here as factors of rows and columns; the tiles keep q and k as they came.
#pragma once
#include "gated_delta/chunk_inverse.cuh"
#include "gated_delta/chunk_pipeline.cuh"

namespace df::cuda {
// What the state warpgroups scale rows of tokens with, when nothing else needs the table any more:
// gam becomes gam_i / |k_i|, rq gam_i / |q_i|, and del del_i / |k_i|.
template <int kC>
__device__ inline void combine_factors(TokenTable<kC>& t, int thread) {
  if (thread >= kC) return;
  t.rq[thread] *= t.gam[thread];
  t.gam[thread] *= t.rk[thread], t.del[thread] *= t.rk[thread];
}

// c becomes what rounding it to E leaves.
template <class E, int kN>
__device__ inline void keep_remainder(float (&c)[kN][4]) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const float2 kept = unpack<E>(pack<E>(c[n][i], c[n][i + 1]));
      c[n][i] -= kept.x, c[n][i + 1] -= kept.y;
    }
}

__device__ inline float2 load_pair(const float* x) { return *reinterpret_cast<const float2*>(x); }

// What a lane needs of its rows of an accumulator, row and row + 8 of a warp's 16 from `first` on;
// its columns are col and col + 1 of each 8.
template <int kC>
struct LaneRows {
  int row, col;
  float2 G[2];
  float rq[2], rk[2];
  __device__ LaneRows(const TokenTable<kC>& t, int first) {
    const int lane = thread_anew() % 32;
    row = first + lane / 4, col = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      G[i] = t.G[row + 8 * i], rq[i] = t.rq[row + 8 * i], rk[i] = t.rk[row + 8 * i];
  }
};
// d = e^{G_i - G_j} for the columns of tile n; 0 above the diagonal, where it may be infinite. The
// argument is selected, not the result: that would put a branch around each power.
template <int kC>
__device__ inline void lower_decays(const TokenTable<kC>& t, const LaneRows<kC>& r, int n,
                                    float (&d)[4]) {
  const float4 from = *reinterpret_cast<const float4*>(&t.G[8 * n + r.col]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 to = r.G[i / 2];
    const float x = i % 2 ? (to.x - from.z) + (to.y - from.w) : (to.x - from.x) + (to.y - from.y);
    d[i] = exp2_fast(r.row + i / 2 * 8 >= 8 * n + r.col + i % 2 ? x : -INFINITY);
  }
}

// x = lower(Gam o QK^T) from QK^T, norms included
template <int kC>
__device__ inline void to_attention(const TokenTable<kC>& t, const LaneRows<kC>& r, int n,
                                    const float (&d)[4], float (&x)[4]) {
  const float2 rk = load_pair(t.rk + 8 * n + r.col);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] *= d[i] * (r.rq[i / 2] * (i % 2 ? rk.y : rk.x));
}
// x = strictlower(Gam o KK^T) diag(beta) from KK^T
template <int kC>
__device__ inline void to_system(const TokenTable<kC>& t, const LaneRows<kC>& r, int n,
                                 const float (&d)[4], float (&x)[4]) {
  const float2 rk = load_pair(t.rk + 8 * n + r.col), beta = load_pair(t.beta + 8 * n + r.col);
  const float by[2] = {rk.x * beta.x, rk.y * beta.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool diagonal = r.row + i / 2 * 8 == 8 * n + r.col + i % 2;
    x[i] *= (diagonal ? 0 : d[i]) * (r.rk[i / 2] * by[i % 2]);
  }
}

// `keys`: rows of k, then of q; the products' 64 rows are those of k and then of q for kC = 64, the
// two together for kC = 32, where warps 0 and 1 make A and 2 and 3 make P.
template <class Arch, class E, int kC, int kK>
struct Squares {
  using Keys = Tile<E, 2 * kC, kK>;
  using Square = Tile<E, kC, kC>;
  static constexpr int kParts = sizeof(E) == 2 ? 2 : 1;  // of T'

  using Parts = float4[kC == 64 ? 2 : 1][2][kC == 64 ? 32 : 1];

  // T' to `inverse` (two squares for 16 bits), P to `p` (two if high), if there are queries. By all
  // warps of the group, which have a named barrier of their own; `norms`, by all of them, fills the
  // table's norms while tensor cores multiply, and a warp that has nothing to invert meanwhile does
  // what is `aside`, requested before.
  template <bool kHigh, class Norms, class Aside>
  __device__ static void make(const Keys& keys, const TokenTable<kC>& t, bool queries,
                              uint32_t inverse, uint32_t p, Parts& parts, int barrier, Norms norms,
                              Aside& aside) {
    const int warp = threadIdx.x % 128 / 32;
    const Tile<float, kC, kC> a{inverse};
    if constexpr (kC == 64)
      multiply_squares<kHigh>(keys, t, queries, a, p, barrier, norms);
    else
      multiply_both<kHigh>(keys, t, queries, a, p, barrier, norms);
    if (warp == 3) aside.request();
    if constexpr (kC == 32) {
      named_barrier_sync(barrier, 128);
      if (warp == 0) invert_diagonal<32>(a, 0);
      if (warp == 3) aside.run();
    } else {
      __syncwarp();
      invert_diagonal<16>(a, warp);
      named_barrier_sync(barrier, 128);
      Block joined;
      if (warp < 2) join_blocks(a, warp, joined);
      if (warp == 3) aside.run();
      named_barrier_sync(barrier, 128);
      Block x, own;
      join_pairs(a, warp, parts, x);
      load_block(a, warp, warp, own);
      named_barrier_sync(barrier, 128);  // T' takes the room of A
      take_part(warp, parts, x);
      const Square high{inverse}, low{inverse + Square::kBytes};
      if (warp < 2) store_pair(joined, 2 * warp + 1, 2 * warp, high, low);
      store_pair(x, 2 + warp / 2, warp % 2, high, low);
      store_pair(own, warp, warp, high, low);
      clear_upper(high, low, thread_anew() % 128);
    }
  }

 private:
  // Both products side by side; without wgmma one after the other, which takes half the registers.
  template <bool kHigh, class Norms>
  __device__ static void multiply_squares(const Keys& keys, const TokenTable<kC>& t, bool queries,
                                          const Tile<float, kC, kC>& a, uint32_t p, int barrier,
                                          Norms norms) {
    float kk[kC / 8][4];
    clear<kC>(kk);
    if constexpr (Arch::kAsync) {
      float qk[kC / 8][4];
      clear<kC>(qk);
      Arch::begin(kk, qk);
      Arch::template mma<kC, kK>(kk, keys.along_k(), keys.along_k());
      if (queries) Arch::template mma<kC, kK>(qk, keys.along_k().from(kC, 0), keys.along_k());
      Arch::commit();
      norms();
      Arch::template wait<0>(kk, qk);
      named_barrier_sync(barrier, 128);
      const LaneRows<kC> rows(t, threadIdx.x % 128 / 32 * 16);
#pragma unroll
      for (int n = 0; n < kC / 8; ++n) {
        float d[4];
        lower_decays(t, rows, n, d);
        to_system(t, rows, n, d, kk[n]);
        if (queries) to_attention(t, rows, n, d, qk[n]);
      }
      if (queries) store_attention<kHigh>(qk, p);
    } else {
      norms();
      named_barrier_sync(barrier, 128);
      const LaneRows<kC> rows(t, threadIdx.x % 128 / 32 * 16);
      float d[4];
      if (queries) {
        Arch::template mma<kC, kK>(kk, keys.along_k().from(kC, 0), keys.along_k());
#pragma unroll
        for (int n = 0; n < kC / 8; ++n)
          lower_decays(t, rows, n, d), to_attention(t, rows, n, d, kk[n]);
        store_attention<kHigh>(kk, p);
        clear<kC>(kk);
      }
      Arch::template mma<kC, kK>(kk, keys.along_k(), keys.along_k());
#pragma unroll
      for (int n = 0; n < kC / 8; ++n)
        lower_decays(t, rows, n, d), to_system(t, rows, n, d, kk[n]);
    }
    store_tile<kC>(kk, a);
  }
  template <bool kHigh, class Norms>
  __device__ static void multiply_both(const Keys& keys, const TokenTable<kC>& t, bool queries,
                                       const Tile<float, kC, kC>& a, uint32_t p, int barrier,
                                       Norms norms) {
    const int warp = threadIdx.x % 128 / 32;
    float both[kC / 8][4];
    clear<kC>(both);
    if (warp < 2 || queries) multiply_by_parts(keys, both);
    norms();
    named_barrier_sync(barrier, 128);
    const LaneRows<kC> rows(t, warp % 2 * 16);
#pragma unroll
    for (int n = 0; n < kC / 8; ++n) {
      float d[4];
      lower_decays(t, rows, n, d);
      if (warp < 2)
        to_system(t, rows, n, d, both[n]);
      else
        to_attention(t, rows, n, d, both[n]);
    }
    if (warp < 2)
      store_tile<kC>(both, a);
    else if (queries)
      store_attention<kHigh>(both, p - kC * 128);
  }
  // Sums of 32 columns of K at a time: what all elements of KK^T have in common of an error, as
  // with equal keys, T' makes a hundred times larger.
  __device__ static void multiply_by_parts(const Keys& keys, float (&both)[kC / 8][4]) {
#pragma unroll
    for (int k = 0; k < kK; k += 32) {
      float part[kC / 8][4];
      clear<kC>(part);
      Arch::template mma<kC, 32>(part, keys.along_k().from(0, k), keys.along_k().from(0, k));
#pragma unroll
      for (int n = 0; n < kC / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) both[n][i] += part[n][i];
    }
  }
  template <bool kHigh>
  __device__ static void store_attention(float (&x)[kC / 8][4], uint32_t p) {
    store_tile<kC>(x, Square{p});
    if constexpr (kHigh && sizeof(E) == 2) {
      keep_remainder<E>(x);
      store_tile<kC>(x, Square{p + Square::kBytes});
    }
  }
};
}  // namespace df::cuda
