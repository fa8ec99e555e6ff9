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

namespace df::cuda {
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
  __device__ void errors() const {  // E = T' W
    Accumulator<kV> e;
    clear<kV>(e);
    Arch::begin(e);
    Arch::template mma<kV, kC>(e, tiles.inverse(0).along_k(), tiles.w().along_mn());
    Arch::template mma<kV, kC>(e, tiles.inverse(1).along_k(), tiles.w().along_mn());
    Arch::commit();
    Arch::template wait<0>(e);
    const auto to = this->pairs(tiles.e(), tiles.stage);
    Base::template each_pair<kV>([&](int n, int half) {
      store_pair_at<E>(to.at(n, half), e[n][2 * half], e[n][2 * half + 1]);
    });
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
        this->residuals(t, value_dots);
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
    this->template add_state<kK>(x, 0, factor, key_dots, d);
    this->row_sums(t, key_dots, value_dots, inner, sums);
    Accumulator<kC> gram;
    this->template make_gram<kC>(gram, 0);
    renumber();
    if (role == 0 && head > first) named_barrier_sync(kRowsRead, kBoth);
    this->template square_gradients<kC>(t, 0, square, gram);
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
    this->rectangle_sums(t, gram, sums);
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
