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
  // d += factor o (a S^T) with S^T of `state`; dots += rows of a S^T times those of `key`.
  __device__ void read_state(const typename C::SquareTile& from, const typename C::StateTile& state,
                             const typename C::KeyTile& key, const float (&factor)[2],
                             float (&dots)[2], float (&d)[kK / 8][4]) const {
    Fragment<E, kV> a;
    if constexpr (C::kFragments) load_fragment<kV>(a, own(from).along_k());
#pragma unroll
    for (int k0 = 0; k0 < kK; k0 += C::kPanel) {
      Accumulator<C::kPanel> x;
      clear<C::kPanel>(x);
      if constexpr (C::kFragments) {
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
    for (int n = 0; n < kC / 8; ++n) {
      const uint4 y = load_unit(kept(at, n));
      x[n][0] = __uint_as_float(y.x), x[n][1] = __uint_as_float(y.y);
      x[n][2] = __uint_as_float(y.z), x[n][3] = __uint_as_float(y.w);
    }
  }

  // QK^T or KK^T, not normed: made once where they can be kept, else once a head.
  __device__ void make_gram(float (&gram)[kC / 8][4]) const {
    clear<kC>(gram);
    Arch::begin(gram);
    Arch::template mma<kC, kK>(gram, own(tiles.key(role)).along_k(), tiles.key(1).along_k());
    Arch::commit();
    Arch::template wait<0>(gram);
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
      const int last = r - role - column(0, 0);  // of the lower triangle, counted from this lane
      const float norm = role ? norms.rk[r] : norms.rq[r];
      const uint32_t at = pairs(tiles.square(role), half);
#pragma unroll
      for (int n = 0; n < kC / 8; ++n) {
        float stored[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int col = column(n, i);
          const bool lower = 8 * n + i <= last;
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
  __device__ void rectangle_sums(const TokenTable<kC>& t, float (&x)[kC / 8][4], Sums& of) const {
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
        if (lane < 4) of.columns[role][warp()][column(n, i)] = upper;
        x[n][i] = upper, x[n][i + 2] = below;
      }
    group_barrier();
#pragma unroll
    for (int w = 1; w < C::kWarps; ++w) {
      if (w <= warp()) continue;
#pragma unroll
      for (int n = 0; n < kC / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) x[n][i] += of.columns[role][w][column(n, i)];
    }
    float sums[2] = {0, 0};
    const int last[2] = {row(0) - column(0, 0), row(1) - column(0, 0)};
#pragma unroll
    for (int n = 0; n < kC / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (8 * n + i % 2 < last[i / 2]) sums[i / 2] += t.beta[column(n, i)] * x[n][i];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = lane_sum<4>(sums[half]);
      if (lane % 4 == 0) of.rectangle[role][row(half)] = sum;
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
    if constexpr (C::kPipelined) add_rectangles_below(t, of, rectangle);
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
}  // namespace df::cuda
