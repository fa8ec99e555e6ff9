// The C x C matrices of a chunk, by one warpgroup: from its token table and the tile [K; Q]
//   A = strictlower(Gam o KK^T) diag(beta)     T' = (I + A)^-1     P = lower(Gam o QK^T)
// l2norm enters here as factors of rows and columns; the tiles keep q and k as they came.
#pragma once
#include "gated_delta/chunk_inverse.cuh"
#include "gated_delta/chunk_pipeline.cuh"

namespace df::cuda {
// What the state warpgroups scale rows of tokens with.
template <int kC>
struct ChunkFactors {
  float read[kC], query[kC], write[kC];  // gam_i / |k_i|, gam_i / |q_i|, del_i / |k_i|
};

template <int kC>
__device__ inline void combine_factors(const TokenTable<kC>& t, ChunkFactors<kC>& f, int thread) {
  if (thread >= kC) return;
  f.read[thread] = t.gam[thread] * t.rk[thread];
  f.query[thread] = t.gam[thread] * t.rq[thread];
  f.write[thread] = t.del[thread] * t.rk[thread];
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

// x_ij = e^{G_i - G_j} x_ij row_i col_j for i >= j (i > j if strict), else 0; `first` is this
// warp's first row. Selected: above the diagonal decays may be infinite.
template <bool kStrict, int kC>
__device__ inline void decay_lower(const TokenTable<kC>& t, int first, const float* row_factor,
                                   const float* col_factor, const float* col_factor2,
                                   float (&x)[kC / 8][4]) {
  const int thread = thread_anew(), g = thread % 32 / 4, t2 = thread % 4 * 2;
  const float rows[2] = {row_factor[first + g], row_factor[first + g + 8]};
#pragma unroll
  for (int n = 0; n < kC / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first + g + i / 2 * 8, col = 8 * n + t2 + i % 2;
      float y = 0;
      if (8 * n < first + 16 && (kStrict ? row > col : row >= col)) {
        y = x[n][i] * t.decay(row, col) * (rows[i / 2] * col_factor[col]);
        if (col_factor2) y *= col_factor2[col];
      }
      x[n][i] = y;
    }
}

// `keys`: rows of k, then of q; the products' 64 rows are those of k and then of q for kC = 64, the
// two together for kC = 32, where warps 0 and 1 make A and 2 and 3 make P.
template <class Arch, class E, int kC, int kK>
struct Squares {
  using Keys = Tile<E, 2 * kC, kK>;
  using Square = Tile<E, kC, kC>;
  static constexpr int kParts = sizeof(E) == 2 ? 2 : 1;  // of T'

  // T' to `inverse` (two squares for 16 bits), P to `p` (two if high), if there are queries. By all
  // warps of the group, which have a named barrier of their own.
  template <bool kHigh>
  __device__ static void make(const Keys& keys, const TokenTable<kC>& t, bool queries,
                              uint32_t inverse, uint32_t p, int barrier) {
    const int warp = threadIdx.x % 128 / 32;
    const Tile<float, kC, kC> a{inverse};
    if constexpr (kC == 64) {
      float kk[8][4], qk[8][4];
      multiply(keys, queries, kk, qk);
      if (queries) {
        decay_lower<false, kC>(t, 16 * warp, t.rq, t.rk, nullptr, qk);
        store_attention<kHigh>(qk, p);
      }
      decay_lower<true, kC>(t, 16 * warp, t.rk, t.rk, t.beta, kk);
      store_tile<kC>(kk, a);
    } else {
      float both[4][4];
      clear<kC>(both);
      if (warp < 2 || queries) Arch::template mma<kC, kK>(both, keys.along_k(), keys.along_k());
      if (warp < 2) {
        decay_lower<true, kC>(t, 16 * warp, t.rk, t.rk, t.beta, both);
        store_tile<kC>(both, a);
      } else if (queries) {
        decay_lower<false, kC>(t, 16 * (warp - 2), t.rq, t.rk, nullptr, both);
        store_attention<kHigh>(both, p - kC * 128);
      }
    }
    __syncwarp();
    invert(a, warp, inverse, barrier);
  }

 private:
  __device__ static void multiply(const Keys& keys, bool queries, float (&kk)[8][4],
                                  float (&qk)[8][4]) {
    clear<64>(kk), clear<64>(qk);
    Arch::begin(kk, qk);
    Arch::template mma<64, kK>(kk, keys.along_k(), keys.along_k());
    if (queries) Arch::template mma<64, kK>(qk, keys.along_k().from(64, 0), keys.along_k());
    Arch::commit();
    Arch::template wait<0>(kk, qk);
  }
  template <bool kHigh>
  __device__ static void store_attention(float (&x)[kC / 8][4], uint32_t p) {
    store_tile<kC>(x, Square{p});
    if constexpr (kHigh && sizeof(E) == 2) {
      keep_remainder<E>(x);
      store_tile<kC>(x, Square{p + Square::kBytes});
    }
  }
  // In place: T' takes the room of A when every warp has its block column in registers.
  __device__ static void invert(const Tile<float, kC, kC>& a, int warp, uint32_t inverse,
                                int barrier) {
    const bool mine = warp < kC / 16;
    InverseColumn<kC> x;
    if (mine) invert_diagonal(a, warp);
    named_barrier_sync(barrier, 128);
    if (mine) invert_column<kC>(a, warp, x);
    named_barrier_sync(barrier, 128);
    if (mine) store_inverse<kC, E>(x, warp, Square{inverse}, Square{inverse + Square::kBytes});
  }
};
}  // namespace df::cuda
