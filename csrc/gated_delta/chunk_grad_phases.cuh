// Of the kernel of chunk_bwd_chunks.cuh: its phases, as functions of one thread's view.
#pragma once
#include "gated_delta/chunk_grad_tiles.cuh"

namespace df::cuda {
// A thread's view of the CTA's chunk.
template <class C>
struct ChunkGrads {
  using Arch = typename C::Arch;
  using E = typename C::E;
  static constexpr int kK = C::kK, kC = C::kC, kV = C::kV;
  static constexpr int kUnit = 16 / int(sizeof(E));

  using Tiles = std::conditional_t<C::kPipelined, ChunkGradStages<C>, ChunkGradTiles<C>>;
  using Sums = ChunkGradSums<C>;

  const ChunkBwdCuda& p;
  Tiles tiles;
  ChunkGradScalars<C>& scalars;
  int role;    // 0 queries, 1 keys
  int thread;  // of the group

  __device__ ChunkGrads(const ChunkBwdCuda& p, char* shared)
      : p(p),
        tiles{shared_address(shared)},
        scalars(*reinterpret_cast<ChunkGradScalars<C>*>(shared + Tiles::kScalars)),
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
    tiles.base &= ~1023u;  // says that it ends in zeros
    thread = int(threadIdx.x % C::kGroupThreads + zero);
  }
  __device__ int warp() const { return thread / 32; }
  // where this thread's elements of an accumulator stand: row(0) and row(1)
  __device__ int row(int half) const { return thread / 32 * 16 + thread % 32 / 4 + 8 * half; }

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

  // c += a b, C::kWidth columns after the other, C::kStep terms of their sums after the other. That
  // this is a loop keeps the compiler from loading operands of many steps ahead of their use, which
  // takes the registers of d.
  template <int kN, int kSum, Major kMajorA, Major kMajorB>
  __device__ static void multiply(float (&c)[kN / 8][4], const Operand<E, kMajorA>& a,
                                  const Operand<E, kMajorB>& b) {
    constexpr int kStep = C::kStep < kSum ? C::kStep : kSum;
    constexpr int kWidth = C::kWidth < kN ? C::kWidth : kN;
    static_assert(kSum % kStep == 0 && kN % kWidth == 0);
#pragma unroll
    for (int n = 0; n < kN; n += kWidth)
#pragma unroll 1
      for (int k = 0; k < kSum; k += kStep)
        Arch::template mma<kWidth, kStep>(reinterpret_cast<float(&)[kWidth / 8][4]>(c[n / 8]),
                                          kMajorA == Major::k ? a.from(0, k) : a.from(k, 0),
                                          kMajorB == Major::k ? b.from(n, k) : b.from(k, n));
  }
  // d += diag(factor) a b, likewise
  template <Major kMajorA, Major kMajorB>
  __device__ static void multiply_scaled(float (&d)[kK / 8][4], const float (&factor)[2],
                                         const Operand<E, kMajorA>& a,
                                         const Operand<E, kMajorB>& b) {
    constexpr int kStep = C::kStep;
#pragma unroll 1
    for (int k = 0; k < kV; k += kStep) {
      Fragment<E, kStep> x;
      load_fragment<kStep>(x, a.from(0, k));
      scale_fragment<kStep>(x, factor);
      Arch::begin(d, x);
      Arch::template mma<kK, kStep>(d, x, b.from(k, 0));
      Arch::commit();
      Arch::template wait<0>(d, x);
    }
  }

  // ---- phases of a tile of V
  // d += factor o x, x of the columns of K from k0 on; dots += rows of x times those of q or k.
  template <int kN>
  __device__ void add_state(const float (&x)[kN / 8][4], int k0, const float (&factor)[2],
                            float (&dots)[2], float (&d)[kK / 8][4]) const {
    const auto keys = pairs(tiles.key(role), tiles.base);
    each_pair<kN>([&](int n, int half) {
      const float2 y = load_pair_at<E>(keys.at(k0 / 8 + n, half));
      const float x0 = x[n][2 * half], x1 = x[n][2 * half + 1];
      dots[half] += y.x * x0, dots[half] += y.y * x1;
      d[k0 / 8 + n][2 * half] += factor[half] * x0;
      d[k0 / 8 + n][2 * half + 1] += factor[half] * x1;
    });
  }
  // That of x = a S^T with S^T of `state`.
  __device__ void read_state(const typename C::SquareTile& from, const typename C::StateTile& state,
                             const float (&factor)[2], float (&dots)[2],
                             float (&d)[kK / 8][4]) const {
#pragma unroll
    for (int k0 = 0; k0 < kK; k0 += C::kPanel) {
      Accumulator<C::kPanel> x;
      clear<C::kPanel>(x);
      Arch::begin(x);
      multiply<C::kPanel, kV>(x, own(from).along_k(), state.along_mn().from(0, k0));
      Arch::commit();
      Arch::template wait<0>(x);
      add_state<C::kPanel>(x, k0, factor, dots, d);
    }
  }

  // W = V - gam o K S0 into w; dots += rows of K S0 times those of dW.
  __device__ void residuals(const TokenTable<kC>& t, float (&dots)[2]) const {
#pragma unroll
    for (int v = 0; v < kV; v += C::kCols) {
      Accumulator<C::kCols> x;
      clear<C::kCols>(x);
      Arch::begin(x);
      multiply<C::kCols, kK>(x, tiles.key(1).along_k(), tiles.s().along_k().from(v, 0));
      Arch::commit();
      Arch::template wait<0>(x);
      const TokenTable<kC>& norms = scalars.table[0];
      const float factor[2] = {t.gam[row(0)] * norms.rk[row(0)], t.gam[row(1)] * norms.rk[row(1)]};
      const uint32_t at = tiles.s().base;
      const auto of_v = pairs(tiles.v(), at), of_w = pairs(tiles.w(), at);
      const auto of_dW = pairs(tiles.a(1), at);
      each_pair<C::kCols>([&](int n, int half) {
        const float x0 = x[n][2 * half], x1 = x[n][2 * half + 1];
        n += v / 8;
        const float2 y = load_pair_at<E>(of_v.at(n, half)), dW = load_pair_at<E>(of_dW.at(n, half));
        dots[half] += x0 * dW.x, dots[half] += x1 * dW.y;
        store_pair_at<E>(of_w.at(n, half), y.x - factor[half] * x0, y.y - factor[half] * x1);
      });
    }
  }

  __device__ void errors() const {  // E = T' W, in the place of W
#pragma unroll
    for (int v = 0; v < kV; v += C::kCols) {
      Accumulator<C::kCols> e;
      clear<C::kCols>(e);
      const auto w = tiles.w().along_mn().from(0, v);
      Arch::begin(e);
      multiply<C::kCols, kC>(e, tiles.square(0).along_k(), w);
      if constexpr (sizeof(E) == 2) multiply<C::kCols, kC>(e, tiles.square(1).along_k(), w);
      Arch::commit();
      Arch::template wait<0>(e);
      group_barrier();  // W is read
      const auto to = pairs(tiles.w(), tiles.base);
      each_pair<C::kCols>([&](int n, int half) {
        store_pair_at<E>(to.at(v / 8 + n, half), e[n][2 * half], e[n][2 * half + 1]);
      });
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

  // ---- accumulators in shared memory, from `at` on
  __device__ uint32_t kept(int at, int n) const {
    return tiles.base + at + (n * C::kThreads + all_threads()) * 16;
  }
  __device__ void keep(int at, const float (&x)[kC / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kC / 8; ++n)
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(kept(at, n)), "f"(x[n][0]),
                   "f"(x[n][1]), "f"(x[n][2]), "f"(x[n][3])
                   : "memory");
  }
  __device__ void load_kept(int at, float (&x)[kC / 8][4]) const {
#pragma unroll
    for (int n = 0; n < kC / 8; ++n) load_kept(at, n, x[n]);
  }
  __device__ void load_kept(int at, int n, float (&x)[4]) const {
    const float4 y = load_shared4(kept(at, n));
    x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
  }

  // QK^T or KK^T, not normed, columns from `first` on: made once where they can be kept, else once
  // a head.
  template <int kCols>
  __device__ void make_gram(float (&gram)[kCols / 8][4], int first) const {
    clear<kCols>(gram);
    Arch::begin(gram);
    multiply<kCols, kK>(gram, own(tiles.key(role)).along_k(),
                        tiles.key(1).along_k().from(first, 0));
    Arch::commit();
    Arch::template wait<0>(gram);
  }
  // ---- once a head
  // From N or M to dP or dKK, of the columns from `first` on: as factors of K, norms of columns
  // included, here and, if the product is to find them there, in a tile; with norms of rows in
  // another one, for the products with the transpose; in `gram` without beta, times gram.
  template <int kCols>
  __device__ void square_gradients(const TokenTable<kC>& t, int first, float (&square)[kC / 8][4],
                                   float (&gram)[kC / 8][4]) const {
    const TokenTable<kC>& norms = scalars.table[0];
    const float factor = role ? -1.0f : p.in.scale;
    const LaneRows<kC> rows(t, warp() * 16);
    const float norm[2] = {role ? norms.rk[rows.row] : norms.rq[rows.row],
                           role ? norms.rk[rows.row + 8] : norms.rq[rows.row + 8]};
    const auto to = pairs(tiles.square(role), tiles.base);
#pragma unroll
    for (int n = first / 8; n < (first + kCols) / 8; ++n) {
      if (n % 2 == 0) __syncwarp();  // or all columns' factors are loaded at once
      if constexpr (Tiles::kKeepsSquare) load_kept(Tiles::kKept, n, square[n]);
      if constexpr (Tiles::kKeepsGram) load_kept(Tiles::kGram, n, gram[n]);
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
      if constexpr (!C::kPipelined) {
        const auto factors = pairs(tiles.factors(role), tiles.base);
        store_pair_at<E>(factors.at(n, 0), square[n][0], square[n][1]);
        store_pair_at<E>(factors.at(n, 1), square[n][2], square[n][3]);
      }
    }
  }
  __device__ void add_rows_of_keys(float (&d)[kK / 8][4]) const {  // dP K or dKK K
    Arch::stores_visible();
    group_barrier();
    Arch::begin(d);
    multiply<kK, kC>(d, own(tiles.factors(role)).along_k(), tiles.key(1).along_mn());
    Arch::commit();
  }
  __device__ void add_columns_of_keys(float (&d)[kK / 8][4]) const {  // dP^T Q + dKK^T K
    Arch::begin(d);
    multiply<kK, kC>(d, own(tiles.square(0)).along_mn(), tiles.key(0).along_mn());
    multiply<kK, kC>(d, own(tiles.square(1)).along_mn(), tiles.key(1).along_mn());
    Arch::commit();
    Arch::template wait<0>(d);
  }

  // Of x, Z without beta, the parts of sum_{i>=t>j} Z_ij: column sums over a warp's rows, for all t
  // above them, and the sums for the t that are among them. What x holds on the diagonal reaches
  // the column sums only.
  __device__ void rectangle_sums(const TokenTable<kC>& t, const float (&x)[kC / 8][4],
                                 Sums& sums) const {
    const int lane = thread % 32, g = lane / 4, q = lane % 4, w = warp();
    float column[kC / 4];
#pragma unroll
    for (int n = 0; n < kC / 4; ++n) column[n] = x[n / 2][n % 2] + x[n / 2][n % 2 + 2];
    fold_lanes<kC / 4>(column, lane & 16, 16);
    fold_lanes<kC / 8>(column, lane & 8, 8);
    fold_lanes<kC / 16>(column, lane & 4, 4);
    float* const to = sums.columns[role][w] + 2 * q;
    if constexpr (kC == 64)  // now those of tile g
      *reinterpret_cast<float2*>(to + 8 * g) = {column[0], column[1]};
    else
      to[g / 2 * 8 + g % 2] = column[0];

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

  // rho = q . X + k . Y of the queries' dots, or kap = k . (E dS^T) of the keys'; <S0, dS>.
  __device__ void row_sums(const TokenTable<kC>& t, const float (&key_dots)[2],
                           const float (&value_dots)[2], float inner, Sums& of) const {
    const TokenTable<kC>& norms = scalars.table[0];
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row(half);
      const float x = lane_sum<4>(key_dots[half]), y = lane_sum<4>(value_dots[half]);
      if (lane % 4) continue;
      if (role)
        of.kap[r] = t.del[r] * norms.rk[r] * x;
      else
        of.rho[r] = t.gam[r] * (p.in.scale * norms.rq[r] * x - norms.rk[r] * y);
    }
    inner = lane_sum<32>(inner);
    if (role && lane == 0) of.inner[warp()] = inner;
  }

  // To the parts of sum_{i>=t>j} Z_ij with i of the warp that has row t, those of the warps below
  // it; by one warp, for its lanes' t. columns: without beta.
  __device__ static void add_rectangles_below(const TokenTable<kC>& t, const Sums& of,
                                              float (&rectangle)[kC / 32]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int block = 0; block < C::kWarps - 1; ++block) {  // t of 16, i of the warps below
      float before = 0;
#pragma unroll
      for (int part = 0; part <= block / 2; ++part) {
        const int j = part * 32 + lane;
        float z = 0;
#pragma unroll
        for (int w = block + 1; w < C::kWarps; ++w) z += of.columns[0][w][j] + of.columns[1][w][j];
        z *= t.beta[j];
        before += part < block / 2 ? lane_sum<32>(z) : sum_before(z);
      }
      if (lane / 16 == block % 2) rectangle[block / 2] += before;
    }
  }
  __device__ static float sum_before(float x) {  // over the lanes before this one
    const int lane = threadIdx.x % 32;
    x = __shfl_up_sync(0xffffffffu, x, 1);
    if (lane == 0) x = 0;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float other = __shfl_up_sync(0xffffffffu, x, step);
      if (lane >= step) x += other;
    }
    return x;
  }

  // dg_t = e^{G_C} <dS, S0> + sum_{j<t} kap_j + sum_{i>=t} rho_i + sum_{i>=t>j} Z_ij, dbeta, and
  // both through gate and sigmoid; by one warp.
  __device__ void scalar_gradients(const TokenTable<kC>& t, const Sums& of, int head) const {
    const ChunkGradPlace place = scalars.place;
    const HeadGate gate = head_gate(p.in.pre, head);
    const float scale = float(p.in.pre.sigmoid_scale);
    const int lane = threadIdx.x % 32;
    float inner = 0, before = 0, after = 0, kap[kC / 32], rho[kC / 32], rectangle[kC / 32];
    for (int w = 0; w < C::kWarps; ++w) inner += of.inner[w];
#pragma unroll
    for (int part = 0; part < kC / 32; ++part) {
      const float x = of.kap[part * 32 + lane] * t.beta[part * 32 + lane];
      kap[part] = before + sum_before(x);
      before += lane_sum<32>(x);
    }
#pragma unroll
    for (int part = kC / 32 - 1; part >= 0; --part) {
      float sum = of.rho[part * 32 + lane];
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const float other = __shfl_down_sync(0xffffffffu, sum, step);
        if (lane + step < 32) sum += other;
      }
      rho[part] = after + sum;
      after += __shfl_sync(0xffffffffu, sum, 0);
    }
#pragma unroll
    for (int part = 0; part < kC / 32; ++part) {
      const int i = part * 32 + lane;
      rectangle[part] = of.rectangle[0][i] + of.rectangle[1][i];
    }
    add_rectangles_below(t, of, rectangle);
    float sums[2] = {0, 0};
#pragma unroll
    for (int part = 0; part < kC / 32; ++part) {
      const int i = part * 32 + lane;
      if (i >= place.rows) continue;
      const Token x = load_token(p.in, gate, place.batch, place.first + i, head);
      float dg = t.chunk_decay * inner + kap[part] + rho[part] + rectangle[part];
      float dbeta = of.kap[i];
      for (int w = 0; w < C::kWarps; ++w) dbeta += of.columns[0][w][i] + of.columns[1][w][i];
      const bool clamped = x.g < kMinGate;
      if (clamped) dg = 0;
      if (gate.fused) {
        sums[0] += dg * clamp_gate(x.g);
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
    const typename C::KeyTile tile = tiles.key(role);
    const auto pair = pairs(tile, tiles.base);
    const TokenTable<kC>& norms = scalars.table[0];
    const ChunkShape& s = p.in.shape;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float r = role ? norms.rk[row(half)] : norms.rq[row(half)];
      float along = 0;
#pragma unroll
      for (int n = 0; n < kK / 8; ++n) {
        const float2 x = load_pair_at<E>(pair.at(n, half));
        along += x.x * d[n][2 * half] + x.y * d[n][2 * half + 1];
      }
      along = p.in.l2norm ? r * r * lane_sum<4>(along) : 0;
#pragma unroll
      for (int n = 0; n < kK / 8; ++n) {
        const float2 x = load_pair_at<E>(pair.at(n, half));
        store_pair_at<E>(pair.at(n, half), r * (d[n][2 * half] - x.x * along),
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
}  // namespace df::cuda
