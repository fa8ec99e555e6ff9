// Backward of the chunked gated delta rule, the part that is sequential: the gradient dS of the
// state, from the last chunk of a sequence to the first (gated_delta.md, 2.4; C tokens a chunk):
//   dU = del o (K dS) + P^T (sc dO);   dV = dW = T'^T (beta o dU);   P = Gam o (Q K^T)
//   dS <- e^{G_C} dS + Q^T (sc gam o dO) - K^T (gam o dW)
// and leaves dV and the dS that enters each step to the kernel that does all chunks side by side.
// A summary of segments (chunk_bwd_cuda.h) has K further rows of dS^T, with dO = 0: M.
//
// CTA = (sequence or segment, value head, 1 or 2 V tiles of 64 columns): a state warpgroup for each
// V tile and one that prepares chunks. A state warpgroup holds dS^T (64 x K, float) in registers
// and has the operand A of all its products there, too, so that the chain never waits for shared
// memory:
//   X = dS^T K^T;  Y = dO^T P;  W = (del o X + Y)^T T';  dS^T += a Q + b K   (64 x C x K)
// with dO^T loaded transposed and beta in del and in P. Y, and Q's part of the new state, run
// behind the products that the chain waits for, and so do the stores of dS and dV (on mma.sync not
// dV's), which go through the tile of dO, as whole vectors. The preparing warpgroup, a chunk ahead:
// requests tiles (TMA by one thread, or cp.async by all), gates and their running sums (from memory
// a chunk before) and norms of q and k while it multiplies for P. Norms go into the factors by
// tokens, so that tiles hold q and k as given.
// Shared memory a stage: q, k, T' (16-bit: two summands), P, dO; K = V = 128: 72 KB, up to 3
// stages; K = 256, V tile of 64: 96 KB, 1 or 2.
// Registers: K / 2 for dS^T, K / 4 for its operand, 5 C / 4 for X, Y and dO: at most 168 a thread
// of 384 (sm_90a: 88 prepare, 208 state, with fewer ptxas would wait for each wgmma by itself), 255
// of 256. Bytes a chunk of V columns and C = 64: 2 (2 K + 2 V) C + 4 C^2 in; 2 C V + 2 K V out.
// FLOPs 2 C V (3 K + 3 C) + 2 C^2 K. Bound by the chain's latency, below 110 chains by it alone.
#pragma once
#include "gated_delta/chunk_bwd_states_cta.cuh"
#include "gated_delta/chunk_squares.cuh"
#include "gated_delta/chunk_state.cuh"

namespace df::cuda {
// ---- products' operands and results by columns, which are tokens
template <class E, int kK>
__device__ inline void scale_tokens(Fragment<E, kK>& a, const float* factors) {
  if constexpr (sizeof(E) == 2) {
#pragma unroll
    for (int k = 0; k < kK / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 by = load_pair(factors + fragment_col(2 * k + i / 2, 0));
        const float2 x = unpack<E>(a.r[k][i]);
        a.r[k][i] = pack<E>(x.x * by.x, x.y * by.y);
      }
  } else {
#pragma unroll
    for (int k = 0; k < kK / 8; ++k) {
      const float2 by = load_pair(factors + fragment_col(k, 0));
      a.r[k][0] *= by.x, a.r[k][1] *= by.y, a.r[k][2] *= by.x, a.r[k][3] *= by.y;
    }
  }
}

// Of this lane's columns, loaded before what they scale is there.
template <int kC>
struct TokenFactors {
  float2 n[kC / 8];
  __device__ explicit TokenFactors(const float* factors) {
#pragma unroll
    for (int i = 0; i < kC / 8; ++i) n[i] = load_pair(factors + fragment_col(i, 0));
  }
  __device__ float of(int i, int element) const { return element % 2 ? n[i].y : n[i].x; }
};
// c scaled, as an operand A
template <class E, int kC>
__device__ inline void to_fragment(const float (&c)[kC / 8][4], const TokenFactors<kC>& by,
                                   Fragment<E, kC>& a) {
  Accumulator<kC> scaled;
#pragma unroll
  for (int n = 0; n < kC / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scaled[n][i] = c[n][i] * by.of(n, i);
  to_fragment<E, kC>(scaled, a);
}

// Four matrices of 8 x 8, m to (row + m / 2 * 8, col + m % 2 * 8) of a tile.
template <class T>
__device__ inline void store_block(const uint32_t (&x)[4], const T& tile, uint32_t row,
                                   uint32_t col, uint32_t lane) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   tile.at(row + lane / 16 * 8 + lane % 8, col + lane / 8 % 2 * 8)),
               "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
#else
#pragma unroll
  for (int m = 0; m < 4; ++m)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(
                     tile.at(row + m / 2 * 8 + lane / 4, col + m % 2 * 8 + lane % 4 * 2)),
                 "r"(x[m])
                 : "memory");
#endif
}

// A fragment to 64 rows of `to`, those of its columns that are below `cols`, a multiple of 64: by
// 64 columns through a tile of 64 rows. A warp's 16 columns there hold the warp's 16 rows, of which
// unit u of 8 columns stands in rows 8 u to 8 u + 7, one half of the rows beside the other. So
// neither blocks nor whole units meet a bank twice.
template <class T, int kK>
__device__ inline void store_state_rows(const Fragment<typename T::E, kK>& a, const T& tile,
                                        typename T::E* to, int stride, int cols) {
  if constexpr (sizeof(typename T::E) == 2) {
    const uint32_t thread = thread_anew(), lane = thread % 32, col = thread % 128 / 32 * 16;
    const uint32_t unit = tile.at(lane, col);  // rows 8 apart are permuted alike
    typename T::E* const at = to + int(col + lane % 8) * stride + lane / 8 * 8;
#pragma unroll
    for (int k = 0; k < kK; k += 64) {
      if (k >= cols) break;
      __syncwarp();
#pragma unroll
      for (int i = 0; i < 4; ++i) store_block(a.r[k / 16 + i], tile, 16 * i, col, lane);
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int u = 0; u < 8; u += 4)
          __stcg(reinterpret_cast<float4*>(at + 8 * half * stride + k + 8 * u),
                 load_shared4((unit ^ half * 16) + u * 1024));
    }
  } else {
    const uint32_t thread = thread_anew();
    float* const first = to + (thread % 128 / 32 * 16 + thread % 32 / 4) * stride + thread % 4 * 2;
#pragma unroll
    for (int k = 0; k < kK / 8; ++k) {
      float* const at = first + 8 * k;
      if (8 * k >= cols) continue;
      *reinterpret_cast<float2*>(at) = {a.r[k][0], a.r[k][1]};
      *reinterpret_cast<float2*>(at + 8 * stride) = {a.r[k][2], a.r[k][3]};
    }
  }
}

// The summary of a segment: a state [rows, Kp] of dH^T, of M behind it, and this V tile's row in
// it.
struct StatesSummary {
  float* state;
  ChunkShape shape;
  int row;
};
template <class C>
__device__ inline StatesSummary summary_of(const C& c, int v0) {
  const int64_t K = pad64(c.p.in.shape.K), V = pad64(c.p.in.shape.V), HV = c.p.in.shape.HV;
  const bool of_V = v0 < V;
  StatesSummary s;
  s.shape.K = K, s.shape.V = of_V ? V : K;
  s.row = of_V ? v0 : v0 - int(V);
  s.state = (of_V ? c.p.segments.states : c.p.segments.transitions) +
            (c.walk().segment * HV + c.walk().head) * s.shape.V * K;
  return s;
}

// beta o dU^T = del o (dS^T K^T) + dO^T P of one V tile, beta in del and P, as an operand A; leaves
// dS behind, and has it decayed.
template <class M, class C>
__device__ inline void output_gradients(const C& c, int stage, int group, int chunk,
                                        float (&dS)[C::kK / 8][4],
                                        Fragment<typename C::E, C::kC>& dO,
                                        Fragment<typename C::E, C::kC>& dU) {
  using E = typename C::E;
  constexpr int kC = C::kC;
  // with registers for it all of K at once, and dO^T P behind the other product
  constexpr bool kBeside = M::kAsync && C::kK <= 128;
  constexpr int kSlice = sizeof(E) == 4 ? 32 : C::kK > 128 ? 64 : C::kK;
  const int Kp = c.walk().padded_k;
  const auto tiles = c.stage(stage);
  const auto& f = c.factors(stage);
  Accumulator<kC> X, Y;
  clear<kC>(X), clear<kC>(Y);
#pragma unroll
  for (int k = 0; k < C::kK; k += kSlice) {
    if (sizeof(E) == 4 && k >= Kp) break;  // the branch of add_product
    Fragment<E, kSlice> part;
    to_fragment(reinterpret_cast<float(&)[kSlice / 8][4]>(dS[k / 8]), part);
    M::begin(X, Y, dO, part);
    M::template mma<kC, kSlice>(X, part, tiles.k.along_k().from(0, k));
    M::commit();
    if constexpr (kBeside) {
      M::template mma<kC, kC>(Y, dO, tiles.P.along_mn());
      M::commit();
    }
    if (!c.p.summary) {
      E* const to = c.kept(c.p.dstates, chunk) + (c.walk().v0 + 64 * group) * Kp + k;
      store_state_rows(part, tiles.d_o(group), to, Kp, Kp - k);
    }
    M::template wait<kBeside ? 1 : 0>(X, part);
  }
  const TokenFactors<kC> by(f.k);
#pragma unroll
  for (int n = 0; n < kC / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) X[n][i] *= by.of(n, i);
  if constexpr (kBeside) {
    M::template wait<0>(Y, dO);
#pragma unroll
    for (int n = 0; n < kC / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) X[n][i] += Y[n][i];
  } else if constexpr (sizeof(E) == 4) {  // dO from its tile, for the same reason
    M::template mma<kC, kC>(X, tiles.d_o(group).along_mn(), tiles.P.along_mn());
  } else {
    M::begin(X, dO);
    M::template mma<kC, kC>(X, dO, tiles.P.along_mn());
    M::commit();
    M::template wait<0>(X, dO);
  }
  to_fragment(X, dU);
}

// dS <- decay dS + a b, of whose columns the first `cols` are not all zeros; with wgmma decay is 1,
// as dS may be part of another product. Without wgmma in parts, so that not too much of b is loaded
// ahead. With floats, each of which takes two registers and every tile of a step a sum of its own,
// only a branch before each part keeps the compiler from that.
template <class M, class E, int kC, int kN>
__device__ inline void add_product(float (&dS)[kN][4], const Fragment<E, kC>& a,
                                   Operand<E, Major::mn> b, int cols, float decay = 1) {
  if constexpr (M::kAsync) {
    M::template mma<8 * kN, kC>(dS, a, b);
  } else {
    constexpr int kPart = sizeof(E) == 2 ? 64 : 16;
#pragma unroll
    for (int n = 0; n < 8 * kN; n += kPart) {
      if (sizeof(E) == 4 && n >= cols) break;
      auto& part = reinterpret_cast<float(&)[kPart / 8][4]>(dS[n / 8]);
      scale_all(part, decay);
      M::template mma<kPart, kC>(part, a, b.from(0, n));
      __syncwarp();
    }
  }
}

// dV of one V tile, through the tile of dO.
template <class M, class C>
__device__ inline void store_values(const C& c, const typename C::Values& tile, int group,
                                    int chunk, const Accumulator<C::kC>& dV) {
  if (c.p.summary) return;
  using E = typename C::E;
  __syncwarp();
  store_transposed<C::kC>(dV, tile, 0);
  __syncwarp();
  const ChunkShape& s = c.p.in.shape;
  const int v0 = c.walk().v0 + 64 * group;
  const int64_t token = c.walk().sequence.batch * s.T + c.first(chunk);
  store_output(tile, 0, static_cast<E*>(c.p.dv) + (token * s.HV + c.walk().head) * s.V + v0,
               s.HV * s.V, c.rows(chunk), int(s.V) - v0, s.V % (16 / int(sizeof(E))) == 0,
               [] { M::stores_visible(); });
}

// One chunk of one V tile: dS of the state that leaves becomes that of the state that entered.
// Once dO is in registers its tile is room for what each warp stores: of 16 columns, which no other
// warp has read.
template <class M, class C>
__device__ inline void step_back(const C& c, int stage, int group, int chunk,
                                 float (&dS)[C::kK / 8][4]) {
  using E = typename C::E;
  constexpr int kC = C::kC;
  const int Kp = c.walk().padded_k;
  const auto tiles = c.stage(stage);
  const auto& f = c.factors(stage);
  Fragment<E, kC> a, dO;
  if constexpr (sizeof(E) == 2) load_fragment<kC>(dO, tiles.d_o(group).along_mn());
  output_gradients<M>(c, stage, group, chunk, dS, dO, a);
  Accumulator<kC> dW;
  clear<kC>(dW);
  M::begin(dW, a);
#pragma unroll
  for (int part = 0; part < C::kParts; ++part)
    M::template mma<kC, kC>(dW, a, tiles.inverse[part].along_mn());
  M::commit();

  if constexpr (!M::kAsync) {  // the products that follow need its registers
    if constexpr (sizeof(E) == 4) load_fragment<kC>(dO, tiles.d_o(group).along_mn());
    to_fragment(dW, TokenFactors<kC>(f.w), a);
    store_values<M>(c, tiles.d_o(group), group, chunk, dW);
  }
  scale_tokens(dO, f.q);
  if constexpr (M::kAsync) scale_all(dS, f.decay);
  M::begin(dS, dO);
  add_product<M>(dS, dO, tiles.q.along_mn(), Kp, M::kAsync ? 1 : f.decay);
  M::commit();
  if constexpr (M::kAsync) {
    const TokenFactors<kC> by_w(f.w);
    M::template wait<1>(dW, a);
    to_fragment(dW, by_w, a);
  }
  M::begin(a);
  add_product<M>(dS, a, tiles.k.along_mn(), Kp);
  M::commit();
  if constexpr (M::kAsync) store_values<M>(c, tiles.d_o(group), group, chunk, dW);
  M::template wait<0>(dS, a, dO);
}

// The tokens of a chunk, by the first of the warps that prepare: requested a chunk ahead.
template <class C>
struct StatesTokens {
  LaneTokens<C::kC> lane{};
  __device__ void request(const C& c, int chunk) {
    fetch_tokens(c.p.in, c.walk().sequence.batch, c.first(chunk), chunk < 0 ? 0 : c.rows(chunk),
                 c.walk().head, lane);
  }
  __device__ void make(const C& c, int chunk) const {
    make_tokens(c.p.in, lane, c.rows(chunk), c.walk().head, c.tokens());
  }
};

// P and the factors of a chunk, by the 128 threads of the last warpgroup.
template <class M, class C>
__device__ inline void prepare(const C& c, int stage, int chunk, StatesTokens<C>& tokens) {
  constexpr int kC = C::kC;
  const uint32_t thread = uint32_t(thread_anew()) % 128;
  const int rows = c.rows(chunk);
  const auto tiles = c.stage(stage);
  const ChunkCuda& in = c.p.in;
  auto& t = c.tokens();
  if (M::kAsync && rows < kC) {
    clear_rows<128>(tiles.q, rows, thread), clear_rows<128>(tiles.k, rows, thread);
    for (int group = 0; group < c.groups; ++group) clear_rows<128>(tiles.d_o(group), rows, thread);
    M::stores_visible();
  }
  // zeros, where every thread copied all tiles, and nobody reads the last chunk's table any more
  named_barrier_sync(1, 128);
  Accumulator<kC> P;
  clear<kC>(P);
  if (thread / 32 * 16 < kC) {
    M::begin(P);
    constexpr int kSlice = sizeof(typename C::E) == 4 ? 32 : C::kK;
#pragma unroll 1
    for (int k = 0; k < C::kK; k += kSlice)
      M::template mma<kC, kSlice>(P, tiles.q.along_k().from(0, k), tiles.k.along_k().from(0, k));
    M::commit();
  }
  if (thread < 32) {
    tokens.make(c, chunk);
    tokens.request(c, chunk - 1);
  }
  if (in.l2norm) {
    row_norms<128>(tiles.q, true, thread, t.rq);
    row_norms<128>(tiles.k, true, thread, t.rk);
  }
  M::template wait<0>(P);
  named_barrier_sync(1, 128);
  if (thread < kC) {
    auto& f = c.factors(stage);
    f.q[thread] = in.scale * t.gam[thread] * t.rq[thread];
    f.k[thread] = t.beta[thread] * t.del[thread] * t.rk[thread];
    f.w[thread] = -t.gam[thread] * t.rk[thread];
    if (thread == 0) f.decay = t.chunk_decay;
  }
  if (thread / 32 * 16 < kC) {
    // sc Gam o P diag(beta), norms included
    LaneDecays<kC>(t, thread / 32).template apply<false>(in.scale, t.rq, t.beta, P);
    if constexpr (sizeof(typename C::E) == 2) {
      Fragment<typename C::E, kC> rows_of_P;
      to_fragment(P, rows_of_P);
      const uint32_t row = thread / 32 * 16;
#pragma unroll
      for (int k = 0; k < kC / 16; ++k) {
        const auto& x = rows_of_P.r[k];
        store_block({x[0], x[2], x[1], x[3]}, tiles.P, row, 16 * k, thread % 32);
      }
    } else {
      store_tile<kC>(P, tiles.P);
    }
  }
  M::stores_visible();
}

// By the preparing warpgroup: tiles of the chunk of a step into a stage; `phase` is that of its
// barriers for this step.
template <class M, class C>
__device__ inline void request(const C& c, const StatesMaps<M::kAsync>& maps, bool vectors,
                               int step, int stage, int phase, int thread) {
  if (step >= c.walk().chunks || (M::kAsync && thread)) return;
  const int chunk = c.walk().chunks - 1 - step;
  if (step >= c.stages) mbarrier_wait(c.empty(stage), phase ^ 1);
  if constexpr (M::kAsync) {
    load_stage(c, maps, chunk, stage);
  } else {
    load_stage(c, vectors, chunk, stage, thread);
    mbarrier_arrive_after_cp_async(c.loaded(stage));
  }
}

// The state warpgroups are a chunk behind this one; a third stage is requested a chunk before.
template <class M, class C>
__device__ inline void prepare_all(const C& c, const StatesMaps<M::kAsync>& maps, bool vectors) {
  const int ahead = c.stages > 2 ? 1 : 0;
  StatesRing ring{c.stages}, requested{c.stages};
  StatesTokens<C> tokens;
  if (threadIdx.x % 128 < 32) tokens.request(c, c.walk().chunks - 1);
  if (!c.p.in.l2norm) {  // all ones, for all chunks
    row_norms<128>(c.stage(0).q, false, threadIdx.x % 128, c.tokens().rq);
    row_norms<128>(c.stage(0).k, false, threadIdx.x % 128, c.tokens().rk);
  }
#pragma unroll 1
  for (int step = -ahead; step < c.walk().chunks; ++step) {
    request<M>(c, maps, vectors, step + ahead, requested.stage, requested.phase,
               thread_anew() % 128);
    requested.next();
    if (step < 0) continue;
    mbarrier_wait(c.loaded(ring.stage), ring.phase);
    prepare<M>(c, ring.stage, c.walk().chunks - 1 - step, tokens);
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(c.ready(ring.stage));
    ring.next();
  }
}

template <class C>
__device__ inline float* state_of(const C& c, float* states) {
  const ChunkShape& s = c.p.in.shape;
  return states + (c.walk().n * s.HV + c.walk().head) * s.K * s.V;
}

// dS^T that leaves the chain or its segment. A summary starts from zero, the rows of M from the
// identity.
template <class C>
__device__ inline void load_leaving(const C& c, int v0, float (&dS)[C::kK / 8][4]) {
  const int behind = v0 - int(pad64(c.p.in.shape.V));
  if (behind >= 0) {
#pragma unroll
    for (int n = 0; n < C::kK / 8; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) dS[n][i] = behind + fragment_row(i) == fragment_col(n, i);
  } else if (c.walk().last) {
    if (c.p.d_final_state)
      load_state(state_of(c, const_cast<float*>(c.p.d_final_state)), c.p.in.state_v_first,
                 c.p.in.shape, v0, dS);
  } else if (!c.p.summary) {
    const StatesSummary s = summary_of(c, v0);
    load_state(s.state, true, s.shape, s.row, dS);
  }
}

template <class M, class C>
__device__ inline void walk_back(const C& c, int group) {
  Accumulator<C::kK> dS;
  clear<C::kK>(dS);
  load_leaving(c, c.walk().v0 + 64 * group, dS);
  StatesRing ring{c.stages};
#pragma unroll 1
  for (int chunk = c.walk().chunks - 1; chunk >= 0; --chunk) {
    mbarrier_wait(c.loaded(ring.stage), ring.phase);
    mbarrier_wait(c.ready(ring.stage), ring.phase);
    step_back<M>(c, ring.stage, C::kMaxGroups == 1 ? 0 : anew(group), chunk, dS);
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(c.empty(anew(ring.stage)));  // its address, too
    ring.next();
  }
  const int v0 = c.walk().v0 + 64 * group;
  if (c.p.summary) {
    const StatesSummary s = summary_of(c, v0);
    store_state(s.state, true, s.shape, s.row, dS);
  } else if (c.p.d_initial_state && c.walk().first) {
    store_state(state_of(c, c.p.d_initial_state), c.p.in.state_v_first, c.p.in.shape, v0, dS);
  }
}

template <class M, class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    chunk_bwd_states_kernel(const __grid_constant__ ChunkBwdCuda p,
                            const __grid_constant__ StatesMaps<M::kAsync> maps, int groups,
                            int stages, bool vectors) {
  extern __shared__ __align__(1024) char memory[];
  const C c{p, C::kMaxGroups == 1 ? 1 : groups, stages, memory};
  const int rows = int(pad64(p.in.shape.V) + (p.summary ? pad64(p.in.shape.K) : 0));
  if (threadIdx.x == 0) {
    c.walk() = walk_of<C::kC>(p.in, p.segments.chunks, blockIdx.x, rows / 64 / groups, 64 * groups);
    if (shared_address(memory) % 1024) __trap();
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(c.loaded(i), M::kAsync ? 1 : 128);
      mbarrier_init(c.ready(i), 4);
      mbarrier_init(c.empty(i), 4 * groups);
    }
#if __CUDA_ARCH__ >= 900
    mbarrier_fence_init();
#endif
  }
  __syncthreads();
  // a slot without tokens; of a summary, nothing asks for what the first segment makes of dS, nor
  // for the last one's M
  const Walk& w = c.walk();
  if (w.chunks < 0 || (p.summary && (w.first || (w.last && w.v0 >= pad64(p.in.shape.V))))) return;
  const int group = threadIdx.x / 128;
#if __CUDA_ARCH__ >= 900
  if constexpr (M::kAsync && C::kMaxGroups == 2) {
    static_assert(registers_fit(3, 88 + 2 * 208));
    if (group == groups)
      registers_down<88>();
    else
      registers_up<208>();
  }
#endif
  if (group == groups)
    prepare_all<M>(c, maps, vectors);
  else
    walk_back<M>(c, C::kMaxGroups == 1 ? 0 : group);
}

// ---- launch
// As many stages as fit, up to three; two V tiles a CTA where CTAs of one would not all run at
// once: a chunk takes both hardly longer than one, as the chain of products is as long.
template <class M, class C>
int chunk_bwd_states_launch(const ChunkBwdCuda& p, const StatesMaps<M::kAsync>& maps,
                            void* stream) {
  const auto kernel = chunk_bwd_states_kernel<M, C>;
  int device = 0, most = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  const ChunkShape& s = p.in.shape;
  const int64_t length = p.segments.chunks;
  const int64_t chains = (length ? segment_slots(p.in, length) : p.in.N) * s.HV;
  const int64_t tiles = (pad64(s.V) + (p.summary ? pad64(s.K) : 0)) / 64;
  const int groups = C::kMaxGroups == 2 && tiles % 2 == 0 && chains * tiles > sms ? 2 : 1;
  int stages = 3;
  while (stages > 1 && C::bytes(groups, stages) > most) --stages;
  const int bytes = C::bytes(groups, stages);
  const cudaError_t e =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (e != cudaSuccess) return e;
  const ChunkCuda& in = p.in;
  const bool vectors = whole_vectors(tma_keys(in, in.q)) && whole_vectors(tma_keys(in, in.k)) &&
                       whole_vectors(tma_values(in, p.d_o));
  kernel<<<chains * tiles / groups, 128 * (groups + 1), bytes, static_cast<cudaStream_t>(stream)>>>(
      p, maps, groups, stages, vectors);
  return cudaSuccess;
}

template <class M, class E>
int chunk_bwd_states_by_size(const ChunkBwdCuda& p, const StatesMaps<M::kAsync>& maps,
                             void* stream) {
  if (p.in.shape.K <= 64) return chunk_bwd_states_launch<M, StatesCta<E, 64>>(p, maps, stream);
  if (p.in.shape.K <= 128) return chunk_bwd_states_launch<M, StatesCta<E, 128>>(p, maps, stream);
  return chunk_bwd_states_launch<M, StatesCta<E, 256>>(p, maps, stream);
}

template <class E>
int chunk_bwd_states_tma(const ChunkBwdCuda& p, void* stream) {
  const ChunkCuda& in = p.in;
  const ChunkShape& s = in.shape;
  StatesMaps<true> maps;
  cudaError_t e = cudaSuccess;
  const auto make = [&](CUtensorMap* map, const Tensor4& x) {
    if (e == cudaSuccess) e = make_tensor_map(map, x, int(s.C));
  };
  make(&maps.q, tma_keys(in, in.q)), make(&maps.k, tma_keys(in, in.k));
  make(&maps.d_o, tma_values(in, p.d_o));
  make(&maps.inverse, tma_inverse(in, p.inverse));
  return e == cudaSuccess ? chunk_bwd_states_by_size<Sm90, E>(p, maps, stream) : int(e);
}
}  // namespace df::cuda
