// The C x C matrices of a chunk, by one warpgroup: from its token table and the tile [K; Q]
//   P = lower(Gam o QK^T)     A = strictlower(Gam o KK^T) diag(beta)     T' = (I + A)^-1
// For 16-bit inputs T' comes from memory (chunk_inverse_kernel.cuh). l2norm enters as factors of
// rows and columns; the tiles keep q and k as they came.
#pragma once
#include "gated_delta/chunk_inverse.cuh"
#include "gated_delta/chunk_pipeline.cuh"

namespace df::cuda {
// What the state warpgroups scale rows of tokens with, when nothing else needs the table any more:
// gam becomes gam_i / |k_i|, rq sc gam_i / |q_i|, and del del_i / |k_i|. (P has its sc itself.)
template <int kC>
__device__ inline void combine_factors(TokenTable<kC>& t, float scale, int thread) {
  if (thread >= kC) return;
  t.rq[thread] *= scale * t.gam[thread];
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

__device__ inline float2 load_pair(const float* x) {
  return *reinterpret_cast<const float2*>(x);
}
__device__ inline float difference(const float2& x, const float2& y) {
  return (x.x - y.x) + (x.y - y.y);
}

// e^{G_i - G_j} / |k_j| for this lane's elements of 16 rows of an accumulator, those of block w of
// the diagonal: elements before it as a product of two that are both at most 1 for g <= 0,
//   e^{G_i - G_f} e^{G_f - G_j},   f the block's first row
// which takes powers of rows and columns instead of elements, and elements on it as they are. Above
// the diagonal, where they may be infinite, arguments are selected, not results: that would put a
// branch around each power.
template <int kC>
struct LaneDecays {
  static constexpr int kBlocks = kC / 16;
  int block, row, col;  // of the lane's first element; its columns are col and col + 1 of each 8
  float rows[2];
  float columns[kBlocks - 1][4];
  float diagonal[2][4];

  __device__ LaneDecays(const TokenTable<kC>& t, int block) : block(block) {
    const int lane = thread_anew() % 32;
    row = 16 * block + lane / 4, col = lane % 4 * 2;
    const float2 G[2] = {t.G[row], t.G[row + 8]}, first = t.G[16 * block];
    rows[0] = exp2_fast(difference(G[0], first)), rows[1] = exp2_fast(difference(G[1], first));
#pragma unroll
    for (int b = 0; b < kBlocks - 1; ++b) {
      if (b >= block) break;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const float2 rk = load_pair(&t.rk[16 * b + 8 * n + col]);
#pragma unroll
        for (int e = 0; e < 2; ++e)
          columns[b][2 * n + e] =
              exp2_fast(difference(first, t.G[16 * b + 8 * n + col + e])) * (e ? rk.y : rk.x);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int j = 16 * block + 8 * n + col;
      const float2 rk = load_pair(&t.rk[j]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = difference(G[i / 2], t.G[j + i % 2]);
        diagonal[n][i] =
            exp2_fast(row + i / 2 * 8 >= j + i % 2 ? x : -INFINITY) * (i % 2 ? rk.y : rk.x);
      }
    }
  }

  // x_ij <- scale x_ij decay_ij norms_i factors_j; without factors: 1. Strict: zeros on the
  // diagonal.
  template <bool kStrict>
  __device__ void apply(float scale, const float* norms, const float* factors,
                        float (&x)[kC / 8][4]) const {
    const float own[2] = {scale * norms[row], scale * norms[row + 8]};
    const float far[2] = {own[0] * rows[0], own[1] * rows[1]};
#pragma unroll
    for (int b = 0; b < kBlocks; ++b)
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        float(&y)[4] = x[2 * b + n];
        if (b > block) {
          y[0] = y[1] = y[2] = y[3] = 0;
          continue;
        }
        const int j = 16 * b + 8 * n + col;
        const float2 factor = factors ? load_pair(factors + j) : float2{1, 1};
        if (b < block) {
          const float by[2] = {columns[b % (kBlocks - 1)][2 * n] * factor.x,
                               columns[b % (kBlocks - 1)][2 * n + 1] * factor.y};
#pragma unroll
          for (int i = 0; i < 4; ++i) y[i] *= far[i / 2] * by[i % 2];
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const bool zero = kStrict && row + i / 2 * 8 == j + i % 2;
            const float decay = zero ? 0 : diagonal[n][i];
            y[i] *= decay * (own[i / 2] * (i % 2 ? factor.y : factor.x));
          }
        }
      }
  }
};

// `keys`: rows of k, then of q. 16 bits: P alone; floats: the products' rows are those of both, of
// which warps 0 and 1 make A, then T', and 2 and 3 make P. By all warps of the group, which have a
// named barrier of their own; norms(), by all of them, completes the table.
template <class Arch, class E, int kC, int kK>
struct Squares {
  using Keys = Tile<E, 2 * kC, kK>;
  using Square = Tile<E, kC, kC>;
  static constexpr int kParts = sizeof(E) == 2 ? 2 : 1;  // of T'

  // sc P to `p` (two squares if high), 16 bits.
  template <bool kHigh, class Norms>
  __device__ static void make_attention(const Keys& keys, const TokenTable<kC>& t, float scale,
                                        uint32_t p, Norms norms) {
    float x[kC / 8][4];
    clear<kC>(x);
    Arch::begin(x);
    Arch::template mma<kC, kK>(x, keys.along_k().from(kC, 0), keys.along_k());
    Arch::commit();
    norms();
    const LaneDecays<kC> decays(t, threadIdx.x % 128 / 32);
    Arch::template wait<0>(x);
    decays.template apply<false>(scale, t.rq, nullptr, x);
    store_attention<kHigh>(x, p);
  }

  // T' to `inverse`, and sc P to `p` if there are queries, floats.
  template <class Norms>
  __device__ static void make_both(const Keys& keys, const TokenTable<kC>& t, float scale,
                                   bool queries, uint32_t inverse, uint32_t p, int barrier,
                                   Norms norms) {
    const int warp = threadIdx.x % 128 / 32;
    const Tile<float, kC, kC> a{inverse};
    float both[kC / 8][4];
    clear<kC>(both);
    if (warp < 2 || queries) multiply_by_parts(keys, both);
    norms();
    const LaneDecays<kC> decays(t, warp % 2);
    if (warp < 2) {
      decays.template apply<true>(1, t.rk, t.beta, both);
      store_tile<kC>(both, a);
    } else if (queries) {
      decays.template apply<false>(scale, t.rq, nullptr, both);
      store_attention<false>(both, p - kC * 128);
    }
    named_barrier_sync(barrier, 128);
    if (warp == 0) invert_diagonal<32>(a, 0);
  }

 private:
  // Sums of 32 columns of K at a time: what all elements of KK^T have in common of an error, as
  // with equal keys, T' makes a hundred times larger.
  __device__ static void multiply_by_parts(const Keys& keys, float (&both)[kC / 8][4]) {
#pragma unroll 1
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
