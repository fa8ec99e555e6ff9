// The kernel of chunk_bwd_chunks.cuh where two stages of a tile of V fit into shared memory (wgmma,
// K <= 128): the same equations, by three roles that wait for each other only where one needs what
// another makes.
//   queries (warpgroup): W = V - gam K S0, X += dO S0^T, E = T' W, N += dO E^T     -> E
//   keys (warpgroup):    dK -= gam dW S0^T, <S0, dS>, M += dW E^T, Y += E dS^T
//   scalars (a warp):    the table of the next head, then dg and dbeta of this one
// and once a head: dQ += sc gam X, dK += beta del Y, QK^T and KK^T anew, dP and dKK, sums.
//
// What is read by whom decides who loads it and when. Stage i % 2 is that of tile i: V and dO are
// loaded by the queries, S0, dS and dW by the keys, as soon as tile i - 2 is through. A stage is
// full (an mbarrier) when all who loaded it have found their copies complete, in the middle of the
// tile before, and have fenced them for wgmma. That it is refilled only after its last reader
// follows from what is waited for anyway: the queries have read S0 and dW when E is ready, and the
// keys have read E of tile i - 2 when the stage of tile i is full.
//
// Shared bytes: 32 KB + 1280 K of tiles (K = 128: 192 KB), 10 KB of scalars. Registers: 232; K / 2
// each of d and of X or Y, 32 of N or M, 32 of a product in flight. A product of 64 x 128 next to
// another one does not fit, and is waited for.
//
// Per chunk and head at K = V = 128: 16.8 MFLOP, 128 KB, and 64 KB a group: bound by the
// instructions around the products, 750 a warp and tile of V and 1450 a warp and head.
#pragma once
#include "gated_delta/chunk_grad_phases.cuh"
#include "gated_delta/chunk_squares.cuh"

namespace df::cuda {
// What a lane needs of its rows of an accumulator, row and row + 8 of a warp's 16 from `first` on;
// its columns are col and col + 1 of each 8.
template <int kC>
struct LaneRows {
  int row, col;
  float2 G[2];
  __device__ LaneRows(const TokenTable<kC>& t, int first) {
    const int lane = thread_anew() % 32;
    row = first + lane / 4, col = lane % 4 * 2;
    G[0] = t.G[row], G[1] = t.G[row + 8];
  }
};
// d = e^{G_i - G_j} for the columns of tile n; 0 above the diagonal, as in LaneDecays.
template <int kC>
__device__ inline void lower_decays(const TokenTable<kC>& t, const LaneRows<kC>& r, int n,
                                    float (&d)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int j = 8 * n + r.col + i % 2;
    const float x = difference(r.G[i / 2], t.G[j]);
    d[i] = exp2_fast(r.row + i / 2 * 8 >= j ? x : -INFINITY);
  }
}

// Where a lane of an accumulator has its two neighbouring elements of each 8 columns in a tile.
// `first` is that of n = 0 in a tile that starts `offset` bytes before: in tiles at constant
// distances the units of 16 bytes are changed alike behind the swizzle, which shares addresses.
template <class T>
struct TilePairs {
  uint32_t first, offset;
  __device__ uint32_t at(int n, int half) const {  // half: 8 rows below, a period of the swizzle
    constexpr int kBytes = 8 * int(sizeof(typename T::E)), kPerPanel = 128 / kBytes;
    return (first ^ uint32_t(n % kPerPanel * kBytes)) + offset +
           uint32_t(n / kPerPanel * T::kRows * 128 + half * 1024);
  }
};
template <class E>
__device__ inline float2 load_pair_at(uint32_t from) {
  if constexpr (sizeof(E) == 2) {
    uint32_t both;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(both) : "r"(from) : "memory");
    return unpack<E>(both);
  } else {
    return sm80::load_two(from);
  }
}
template <class E>
__device__ inline void store_pair_at(uint32_t to, float x, float y) {
  if constexpr (sizeof(E) == 2)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(pack<E>(x, y)) : "memory");
  else
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(x), "f"(y) : "memory");
}
// A whole tile from rows `stride` elements apart, by kThreads threads numbered from 0.
template <int kThreads, class T>
__device__ inline void copy_tile(const T& tile, const typename T::E* from, int64_t stride,
                                 uint32_t thread) {
  constexpr int kUnit = 16 / int(sizeof(typename T::E)), kUnits = T::kCols / kUnit;
  constexpr int kStep = kThreads / kUnits;  // rows, whole periods of the swizzle
  static_assert(kStep % 8 == 0 && T::kRows % kStep == 0);
  const uint32_t row = thread / kUnits, col = thread % kUnits * kUnit;
  const uint32_t to = tile.at(row, col);
  from += row * stride + col;
#pragma unroll
  for (int step = 0; step < T::kRows / kStep; ++step, from += kStep * stride)
    cp_async16(to + step * kStep * 128, from);
}

template <class C>
struct PipelinedGrads : ChunkGrads<C> {
  using Base = ChunkGrads<C>;
  using Base::all_threads, Base::kC, Base::kK, Base::kV, Base::p, Base::role, Base::row;
  using Base::scalars, Base::thread, Base::tiles, Base::warp;
  using typename Base::Arch;
  using typename Base::E;
  using Table = TokenTable<C::kC>;

  // Barriers of two roles: the one waits, the other arrives.
  enum { kErrors = 3, kRows = 5, kRowsRead = 6, kTable = 7, kSums = 11 };  // + stage, role, head
  static constexpr int kBoth = C::kThreads;

  int first, end;       // heads
  int padded_v, count;  // V to whole tiles; tiles of all heads

  __device__ PipelinedGrads(const ChunkBwdCuda& p, char* shared, int key_head) : Base(p, shared) {
    const int group = int(p.in.shape.HV / p.in.shape.H);
    first = key_head * group, end = first + group;
    const int tiles_v = int(p.in.shape.V + kV - 1) / kV;
    padded_v = tiles_v * kV, count = tiles_v * group;
  }

  // Addresses are computed anew from here on: registers are rare.
  __device__ void renumber() { thread = int(uint32_t(thread_anew()) % C::kGroupThreads); }

  // ---- loads
  __device__ void enter(int i) {
    renumber();
    tiles.enter(i);
    mbarrier_wait(&scalars.full[i & 1], uint32_t(i) / 2 & 1);
  }
  __device__ void copy_rows(const typename C::SquareTile& to, const ChunkRows& x, int head,
                            int v0) const {
    const E* from = static_cast<const E*>(x.first) + head * x.h + v0;
    const int cols = int(p.in.shape.V) - v0, rows = scalars.place.rows;
    if (x.vectors && rows == kC && cols >= kV)
      copy_tile<C::kGroupThreads>(to, from, x.t, thread);
    else if (x.vectors)
      load_tile<true, C::kGroupThreads>(to, from, x.t, rows, cols, thread);
    else
      load_tile<false, C::kGroupThreads>(to, from, x.t, rows, cols, thread);
  }
  // Tile i: columns of V of `head` from v0 on, or of a head behind it if V has less.
  __device__ void load(int i, int head, int v0) {
    if (i < count) issue(i, head, v0);
    cp_async_commit();
  }
  __device__ void issue(int i, int head, int v0) {
    for (; v0 >= padded_v; v0 -= padded_v) ++head;
    const ChunkGradPlace& place = scalars.place;
    const uint32_t stage = tiles.stage;
    tiles.enter(i);
    if (role == 0) {
      copy_rows(tiles.v(), place.v, head, v0);
      copy_rows(tiles.a(0), place.dO, head, v0);
    } else {
      const E* s = this->of_head(place.states, head) + v0 * kK;
      const E* ds = this->of_head(place.dstates, head) + v0 * kK;
      copy_tile<C::kGroupThreads>(tiles.s(), s, kK, thread);
      copy_tile<C::kGroupThreads>(tiles.ds(), ds, kK, thread);
      copy_rows(tiles.a(1), place.dW, head, v0);
    }
    tiles.stage = stage;
  }
  // This thread's loads so far are there, those of tile i among them.
  __device__ void arrive_full(int i) const {
    cp_async_wait<0>();
    Arch::stores_visible();
    if (i < count) mbarrier_arrive(&scalars.full[i & 1]);
  }
  __device__ void load_inverse(int head) const {  // by the queries
    const E* from = this->of_head(scalars.place.inverse, head);
    copy_tile<C::kGroupThreads>(tiles.inverse(0), from, kC, thread);
    copy_tile<C::kGroupThreads>(tiles.inverse(1), from + kC * kC, kC, thread);
    cp_async_commit();
  }

  // ---- phases
  // This lane's pairs of a tile; tiles with one `anchor` share addresses.
  template <class T>
  __device__ TilePairs<T> pairs(const T& tile, uint32_t anchor) const {
    const uint32_t unit = uint32_t(thread % 4 * 2 * int(sizeof(E)));
    return {anchor + uint32_t(row(0)) * 128 + (unit ^ permutation<E>(row(0))), tile.base - anchor};
  }
  // fn(n, half) for all pairs of an accumulator.
  template <int kN, class Fn>
  __device__ static void each_pair(Fn fn) {
#pragma unroll
    for (int i = 0; i < kN / 4; ++i) fn(i / 2, i % 2);
  }

  // W = V - gam o K S0 into w; dots += rows of K S0 times those of dW.
  __device__ void residuals(const Table& t, float (&dots)[2]) const {
    Accumulator<kV> x;
    clear<kV>(x);
    Arch::begin(x);
    Arch::template mma<kV, kK>(x, tiles.key(1).along_k(), tiles.s().along_k());
    Arch::commit();
    Arch::template wait<0>(x);
    const Table& norms = scalars.table[0];
    const float factor[2] = {t.gam[row(0)] * norms.rk[row(0)], t.gam[row(1)] * norms.rk[row(1)]};
    const auto of_v = pairs(tiles.v(), tiles.stage), of_w = pairs(tiles.w(), tiles.stage);
    const auto of_dW = pairs(tiles.a(1), tiles.stage);
    each_pair<kV>([&](int n, int half) {
      const float x0 = x[n][2 * half], x1 = x[n][2 * half + 1];
      const float2 v = load_pair_at<E>(of_v.at(n, half)), dW = load_pair_at<E>(of_dW.at(n, half));
      dots[half] += x0 * dW.x, dots[half] += x1 * dW.y;
      store_pair_at<E>(of_w.at(n, half), v.x - factor[half] * x0, v.y - factor[half] * x1);
    });
  }

  __device__ void errors() const {  // E = T' W
    Accumulator<kV> e;
    clear<kV>(e);
    Arch::begin(e);
    Arch::template mma<kV, kC>(e, tiles.inverse(0).along_k(), tiles.w().along_mn());
    Arch::template mma<kV, kC>(e, tiles.inverse(1).along_k(), tiles.w().along_mn());
    Arch::commit();
    Arch::template wait<0>(e);
    const auto to = pairs(tiles.e(), tiles.stage);
    each_pair<kV>([&](int n, int half) {
      store_pair_at<E>(to.at(n, half), e[n][2 * half], e[n][2 * half + 1]);
    });
  }
  // d += factor o x; dots += rows of x times those of q or k.
  __device__ void add_state(const float (&x)[kK / 8][4], const float (&factor)[2], float (&dots)[2],
                            float (&d)[kK / 8][4]) const {
    const auto keys = pairs(tiles.key(role), tiles.base);
    each_pair<kK>([&](int n, int half) {
      const float2 y = load_pair_at<E>(keys.at(n, half));
      const float x0 = x[n][2 * half], x1 = x[n][2 * half + 1];
      dots[half] += y.x * x0, dots[half] += y.y * x1;
      d[n][2 * half] += factor[half] * x0;
      d[n][2 * half + 1] += factor[half] * x1;
    });
  }

  // From N or M to dP or dKK, as factors of K: norms of columns included; with those of rows in
  // their tile, for the products with the transpose; in `gram` without beta, times gram.
  __device__ void square_gradients(const Table& t, float (&square)[kC / 8][4],
                                   float (&gram)[kC / 8][4]) const {
    const Table& norms = scalars.table[0];
    const float factor = role ? -1.0f : p.in.scale;
    const LaneRows<kC> rows(t, warp() * 16);
    const float norm[2] = {role ? norms.rk[rows.row] : norms.rq[rows.row],
                           role ? norms.rk[rows.row + 8] : norms.rq[rows.row + 8]};
    const auto to = pairs(tiles.square(role), tiles.base);
#pragma unroll
    for (int n = 0; n < kC / 8; ++n) {
      if (n % 2 == 0) __syncwarp();  // or all columns' factors are loaded at once
      float e[4], stored[4];
      lower_decays(t, rows, n, e);
      const float2 rk = load_pair(norms.rk + 8 * n + rows.col);
      const float2 beta = load_pair(t.beta + 8 * n + rows.col);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool diagonal = rows.row + i / 2 * 8 == 8 * n + rows.col + i % 2;
        float &x = square[n][i], &y = gram[n][i];
        x *= (role && diagonal ? 0 : e[i]) * factor;
        y *= x * (norm[i / 2] * (i % 2 ? rk.y : rk.x));
        x *= i % 2 ? beta.y : beta.x;
        stored[i] = x * norm[i / 2];
        x *= i % 2 ? rk.y : rk.x;
      }
      store_pair_at<E>(to.at(n, 0), stored[0], stored[1]);
      store_pair_at<E>(to.at(n, 1), stored[2], stored[3]);
    }
  }

  // Of x, Z without beta, the parts of sum_{i>=t>j} Z_ij: column sums over a warp's rows, for all t
  // above them, and the sums for the t that are among them. What x holds on the diagonal reaches
  // the column sums only.
  __device__ void rectangle_sums(const Table& t, const float (&x)[kC / 8][4],
                                 ChunkGradSums<C>& sums) const {
    const int lane = thread % 32, g = lane / 4, q = lane % 4, w = warp();
    float column[kC / 4];
#pragma unroll
    for (int n = 0; n < kC / 4; ++n) column[n] = x[n / 2][n % 2] + x[n / 2][n % 2 + 2];
    fold_lanes<16>(column, lane & 16, 16);
    fold_lanes<8>(column, lane & 8, 8);
    fold_lanes<4>(column, lane & 4, 4);  // now those of tile g
    float* const to = sums.columns[role][w] + 8 * g + 2 * q;
    *reinterpret_cast<float2*>(to) = {column[0], column[1]};

    float left[2] = {0, 0}, block[2][4] = {};  // columns before the warp's own 16, and those
#pragma unroll
    for (int n = 0; n < kC / 8; ++n) {
      if (n / 2 > w) continue;
      const float2 beta = load_pair(t.beta + 8 * n + 2 * q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float z = x[n][i] * (i % 2 ? beta.y : beta.x);
        if (n / 2 == w)
          block[n % 2][i] = z;
        else
          left[i / 2] += z;
      }
    }
    float sum[4] = {0, 0, 0, 0};  // columns 2 q, 2 q + 1, and 8 behind
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float before = lane_sum<4>(left[half]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const float z = block[m][2 * half], pair = z + block[m][2 * half + 1];
        const float next = __shfl_xor_sync(0xffffffffu, pair, 1), two = pair + next;
        const float others = __shfl_xor_sync(0xffffffffu, two, 2);
        const float at = before + ((q & 1 ? next : 0) + (q & 2 ? others : 0));
        if (g + 8 * half >= 8 * m + 2 * q) sum[2 * m] += at;
        if (g + 8 * half >= 8 * m + 2 * q + 1) sum[2 * m + 1] += at + z;
        before += two + others;
      }
    }
    fold_lanes<4>(sum, lane & 16, 16);
    fold_lanes<2>(sum, lane & 8, 8);
    sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], 4);
    if (g % 2 == 0) sums.rectangle[role][16 * w + 8 * (g / 4) + 2 * q + g / 2 % 2] = sum[0];
  }
  // Sums over two lanes `apart`, each of which keeps half of the numbers: the upper one the second.
  template <int kCount, int kAll>
  __device__ static void fold_lanes(float (&x)[kAll], bool upper, int apart) {
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float mine = upper ? x[i + kCount / 2] : x[i];
      const float other = upper ? x[i] : x[i + kCount / 2];
      x[i] = mine + __shfl_xor_sync(0xffffffffu, other, apart);
    }
  }

  // ---- the roles
  __device__ void load_first() {
    this->load_rows(tiles.key(0), this->rows_of(p.in.q, p.in.shape.K), scalars.place.key_head, 0,
                    p.in.shape.K);
    this->load_rows(tiles.key(1), this->rows_of(p.in.k, p.in.shape.K), scalars.place.key_head, 0,
                    p.in.shape.K);
    cp_async_commit();
    if (role == 0) load_inverse(first);
#pragma unroll 1
    for (int i = 0; i < 2; ++i) load(i, first, i * kV);
    cp_async_wait<1>();  // all but tile 1
    Arch::stores_visible();
    this->barrier();
    mbarrier_arrive(&scalars.full[0]);
    row_norms<C::kGroupThreads>(tiles.key(role), p.in.l2norm, thread,
                                role ? scalars.table[0].rk : scalars.table[0].rq);
    this->barrier();
  }
  __device__ const Table& table(int head) const {
    named_barrier_sync(kTable + 2 * role + head % 2, C::kGroupThreads + 32);
    return scalars.table[head % 2];
  }

  __device__ void queries(float (&d)[kK / 8][4]) {
    int i = 0;
    for (int head = first; head < end; ++head) {
      const Table& t = table(head);
      Accumulator<kC> square;
      Accumulator<kK> x;
      clear<kC>(square), clear<kK>(x);
      float key_dots[2] = {0, 0}, value_dots[2] = {0, 0};
      for (int v0 = 0; v0 < padded_v; v0 += kV, ++i) {
        enter(i);
        residuals(t, value_dots);
        read_dO(x);
        arrive_full(i + 1);  // T' of this tile, too
        this->group_barrier();
        errors();
        Arch::stores_visible();
        named_barrier_arrive(kErrors + (i & 1), kBoth);
        this->group_barrier();
        Fragment<E, kV> a;
        load_fragment<kV>(a, tiles.a(0).along_k());
        Arch::begin(square, a);
        Arch::template mma<kC, kV>(square, a, tiles.e().along_k());
        Arch::commit();
        this->group_barrier();  // dO is read
        load(i + 2, head, v0 + 2 * kV);
        if (v0 + kV == padded_v && head + 1 < end) load_inverse(head + 1);
        Arch::template wait<0>(square, a);
      }
      const float scale = p.in.scale;
      const float factor[2] = {scale * t.gam[row(0)], scale * t.gam[row(1)]};
      finish_head(t, head, square, x, factor, key_dots, value_dots, 0, d);
    }
  }
  __device__ void read_dO(float (&x)[kK / 8][4]) const {  // X += dO S0^T
    Fragment<E, kV> a;
    load_fragment<kV>(a, tiles.a(0).along_k());
    Arch::begin(x, a);
    Arch::template mma<kK, kV>(x, a, tiles.s().along_mn());
    Arch::commit();
    Arch::template wait<0>(x, a);
  }

  __device__ void keys(float (&d)[kK / 8][4]) {
    int i = 0;
    for (int head = first; head < end; ++head) {
      const Table& t = table(head);
      Accumulator<kC> square;
      Accumulator<kK> x;
      clear<kC>(square), clear<kK>(x);
      float key_dots[2] = {0, 0}, value_dots[2] = {0, 0}, inner = 0;
      for (int v0 = 0; v0 < padded_v; v0 += kV, ++i) {
        enter(i);
        inner += read_dW(t, d);
        named_barrier_sync(kErrors + (i & 1), kBoth);
        Arch::begin(square, x);
        Arch::template mma<kC, kV>(square, tiles.a(1).along_k(), tiles.e().along_k());
        Arch::template mma<kK, kV>(x, tiles.e().along_k(), tiles.ds().along_mn());
        Arch::commit();
        arrive_full(i + 1);
        Arch::template wait<0>(square, x);
        this->group_barrier();
        load(i + 2, head, v0 + 2 * kV);
      }
      const float factor[2] = {t.beta[row(0)] * t.del[row(0)], t.beta[row(1)] * t.del[row(1)]};
      finish_head(t, head, square, x, factor, key_dots, value_dots, inner, d);
    }
  }
  // d -= gam dW S0^T; <S0, dS>
  __device__ float read_dW(const Table& t, float (&d)[kK / 8][4]) const {
    Fragment<E, kV> y;
    load_fragment<kV>(y, tiles.a(1).along_k());
    scale_fragment<kV>(y, {-t.gam[row(0)], -t.gam[row(1)]});
    Arch::begin(d, y);
    Arch::template mma<kK, kV>(d, y, tiles.s().along_mn());
    Arch::commit();
    constexpr int kUnits = kK / 8, kStep = C::kGroupThreads / kUnits;
    const uint32_t at = tiles.s().at(thread / kUnits, thread % kUnits * 8);
    float sum[2] = {0, 0};
#pragma unroll
    for (int step = 0; step < kV / kStep; ++step) {
      const uint32_t from = at + step * kStep * 128;
      const uint4 s = load_unit(from), ds = load_unit(from + C::StateTile::kBytes);
      sum[0] += dot_words<E>(s.x, ds.x), sum[1] += dot_words<E>(s.y, ds.y);
      sum[0] += dot_words<E>(s.z, ds.z), sum[1] += dot_words<E>(s.w, ds.w);
    }
    Arch::template wait<0>(d, y);
    return sum[0] + sum[1];
  }

  // x of all tiles to d, dP or dKK from N or M, and the sums of a head.
  __device__ void finish_head(const Table& t, int head, float (&square)[kC / 8][4],
                              const float (&x)[kK / 8][4], const float (&factor)[2],
                              float (&key_dots)[2], const float (&value_dots)[2], float inner,
                              float (&d)[kK / 8][4]) {
    renumber();
    ChunkGradSums<C>& sums = scalars.sums[head % 2];
    add_state(x, factor, key_dots, d);
    this->row_sums(t, key_dots, value_dots, inner, sums);
    Accumulator<kC> gram;
    this->make_gram(gram);
    renumber();
    if (role == 0 && head > first) named_barrier_sync(kRowsRead, kBoth);
    square_gradients(t, square, gram);
    Arch::stores_visible();
    Fragment<E, kC> a;
    to_fragment<E, kC>(square, a);
    if (role == 0)
      named_barrier_arrive(kRows, kBoth);
    else
      named_barrier_sync(kRows, kBoth);
    Arch::begin(d, a);
    Arch::template mma<kK, kC>(d, a, tiles.key(1).along_mn());  // dP K, dKK K
    if (role == 1) {                                            // dP^T Q + dKK^T K
      Arch::template mma<kK, kC>(d, tiles.square(0).along_mn(), tiles.key(0).along_mn());
      Arch::template mma<kK, kC>(d, tiles.square(1).along_mn(), tiles.key(1).along_mn());
    }
    Arch::commit();
    rectangle_sums(t, gram, sums);
    Arch::template wait<0>(d, a);
    if (role == 1 && head + 1 < end) named_barrier_arrive(kRowsRead, kBoth);
    named_barrier_arrive(kSums + head % 2, kBoth + 32);
  }

  __device__ void scalars_of_heads() {  // by one warp
    make_table(first);
    for (int head = first; head < end; ++head) {
      if (head + 1 < end) make_table(head + 1);
      named_barrier_sync(kSums + head % 2, kBoth + 32);
      this->scalar_gradients(scalars.table[head % 2], scalars.sums[head % 2], head);
    }
  }
  __device__ void make_table(int head) const {
    this->load_table(head);
    for (int group = 0; group < 2; ++group)
      named_barrier_arrive(kTable + 2 * group + head % 2, C::kGroupThreads + 32);
  }
};

template <class C>
__device__ inline void chunk_grads_pipelined(const ChunkBwdCuda& p, const ChunkPlace& place,
                                             int slot, int key_head, char* shared) {
  PipelinedGrads<C> my(p, shared, key_head);
  if (threadIdx.x == 0) {
    my.prepare(place, slot, key_head);
    for (uint64_t& full : my.scalars.full) mbarrier_init(&full, C::kThreads);
  }
  __syncthreads();
  constexpr int kDown = 40, kUp = 232;
  static_assert(registers_fit(3, kDown + 2 * kUp));
  if (my.role == 2) {
    registers_down<kDown>();
    if (my.warp() == 0) my.scalars_of_heads();
    return;
  }
  registers_up<kUp>();
  my.load_first();
  Accumulator<C::kK> d;
  clear<C::kK>(d);
  if (my.role == 0)
    my.queries(d);
  else
    my.keys(d);
  my.barrier();  // both are through with the rows of q and k
  my.store_keys(d);
}
}  // namespace df::cuda
