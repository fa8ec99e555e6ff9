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
// and once a head: dP and dKK (over T' and E), products with K and Q, sums for dg and dbeta.
//
// Shared bytes, 16 bits: 63 KB + 512 K of tiles and scalars, 32 KB for QK^T and KK^T and 32 KB, of
// K > 128, for `square` between tiles, where they fit (K = 128: 159 KB); K = 256 on mma.sync lets
// S0 and dS take turns in one buffer. float32: 31 KB + 512 K, twice 8 KB.
// On wgmma, K <= 128 has two stages of what belongs to a tile: chunk_bwd_chunks_pipelined.cuh.
//
// Registers: K / 2 of dQ or dK, 32 of square (float32: 16), 32 of a product in flight (K > 128 on
// mma.sync: 16), 16 of an operand. In all 193 (K = 64) to 255, none of them spilled: few are left
// for operands on their way, which `multiply` thus loads in loops.
//
// Per chunk and head at K = V = 128: 16.8 MFLOP, 128 KB, and 64 KB a group: bound by memory.
#pragma once
#include "gated_delta/chunk_bwd_chunks_pipelined.cuh"

namespace df::cuda {
template <class C>
__device__ inline void chunk_grads_in_phases(const ChunkBwdCuda& p, const ChunkPlace& place,
                                             int slot, int key_head, char* shared) {
  using Arch = typename C::Arch;
  using E = typename C::E;
  using Tiles = ChunkGradTiles<C>;
  const ChunkShape& s = p.in.shape;
  const int G = int(s.HV / s.H);
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
  if constexpr (Tiles::kKeepsGram) {
    Accumulator<C::kC> gram;
    my.template make_gram<C::kC>(gram, 0);
    my.keep(Tiles::kGram, gram);
  }

  for (const int end = head + G; head < end; ++head) {
    const TokenTable<C::kC>& t = scalars.table[head % 2];
    Accumulator<C::kC> square;
    if constexpr (!Tiles::kKeepsSquare) clear<C::kC>(square);
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
        my.read_state(tiles.a(0), tiles.s(), factor, key_dots, d);
      } else {
        my.multiply_scaled(d, {-t.gam[my.row(0)], -t.gam[my.row(1)]}, my.own(tiles.a(1)).along_k(),
                           tiles.s().along_mn());
      }
      Fragment<E, C::kV> a;
      load_fragment<C::kV>(a, my.own(tiles.a(my.role)).along_k());

      my.template arrive<0>();
      my.forget();
      if (my.role == 0) {
        my.errors();
      } else {
        inner += my.inner_product(head, v0);
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
      if constexpr (Tiles::kKeepsSquare)
        v0 == 0 ? clear<C::kC>(square) : my.load_kept(Tiles::kKept, square);
      Arch::begin(square, a);
      Arch::template mma<C::kC, C::kV>(square, a, tiles.w().along_k());
      Arch::commit();
      Arch::template wait<0>(square, a);
      if constexpr (Tiles::kKeepsSquare) my.keep(Tiles::kKept, square);
      if (my.role == 1) {
        const float factor[2] = {t.beta[my.row(0)] * t.del[my.row(0)],
                                 t.beta[my.row(1)] * t.del[my.row(1)]};
        my.read_state(tiles.w(), tiles.ds(), factor, key_dots, d);
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

    Accumulator<C::kC> products;
#pragma unroll
    for (int first = 0; first < C::kC; first += C::kCols) {
      my.forget();
      if constexpr (!Tiles::kKeepsGram)
        my.template make_gram<C::kCols>(
            reinterpret_cast<float(&)[C::kCols / 8][4]>(products[first / 8]), first);
      my.template square_gradients<C::kCols>(t, first, square, products);
    }
    my.add_rows_of_keys(d);
    my.rectangle_sums(t, products, scalars.sums[0]);
    Arch::template wait<0>(d);
    my.barrier();
    my.forget();
    if (my.role == 1) my.add_columns_of_keys(d);
    my.row_sums(t, key_dots, value_dots, inner, scalars.sums[0]);
    my.barrier();
    if (head + 1 < end) my.load_inverse(head + 1);
    cp_async_commit();
    if (my.role == 0 && my.warp() == 0) my.scalar_gradients(t, scalars.sums[0], head);
    if (my.role == 1 && my.warp() == 0 && head + 1 < end) my.load_table(head + 1);
  }
  my.forget();
  my.store_keys(d);
}

template <class C>
__global__ void __launch_bounds__(C::kLaunched, 1)
    chunk_grads_kernel(const __grid_constant__ ChunkBwdCuda p) {
  extern __shared__ __align__(1024) char shared[];
  const ChunkShape& s = p.in.shape;
  const int H = int(s.H), slot = blockIdx.x / H, key_head = blockIdx.x % H, G = int(s.HV / s.H);
  const ChunkPlace place = chunk_place(p.in, slot);
  if (place.rows == 0) {
    for (int h = key_head * G + threadIdx.x; h < (key_head + 1) * G; h += C::kLaunched) {
      if (p.dA_log) p.dA_log[int64_t(slot) * s.HV + h] = 0;
      if (p.ddt_bias) p.ddt_bias[int64_t(slot) * s.HV + h] = 0;
    }
    return;
  }
  if constexpr (C::kPipelined)
    chunk_grads_pipelined<C>(p, place, slot, key_head, shared);
  else
    chunk_grads_in_phases<C>(p, place, slot, key_head, shared);
}

template <class C>
int chunk_grads_launch(const ChunkBwdCuda& p, void* stream) {
  constexpr int kBytes = ChunkGrads<C>::Tiles::kBytes;
  const cudaError_t e = cudaFuncSetAttribute(chunk_grads_kernel<C>,
                                             cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (e != cudaSuccess) return e;
  const unsigned grid = unsigned(p.in.slots() * p.in.shape.H);
  chunk_grads_kernel<C><<<grid, C::kLaunched, kBytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaSuccess;
}

template <class Arch, class E>
int chunk_grads_narrow(const ChunkBwdCuda& p, void* stream) {  // K <= 128
  return p.in.shape.K <= 64 ? chunk_grads_launch<ChunkGradConfig<Arch, E, 64>>(p, stream)
                            : chunk_grads_launch<ChunkGradConfig<Arch, E, 128>>(p, stream);
}
template <class Arch, class E>
int chunk_grads_wide(const ChunkBwdCuda& p, void* stream) {  // K > 128
  return p.in.shape.K <= 192 ? chunk_grads_launch<ChunkGradConfig<Arch, E, 192>>(p, stream)
                             : chunk_grads_launch<ChunkGradConfig<Arch, E, 256>>(p, stream);
}
template <class Arch, class E>
int chunk_grads_dispatch(const ChunkBwdCuda& p, void* stream) {
  return p.in.shape.K <= 128 ? chunk_grads_narrow<Arch, E>(p, stream)
                             : chunk_grads_wide<Arch, E>(p, stream);
}
}  // namespace df::cuda
