// A state warpgroup of the forward: 64 rows of S^T in registers, through the chunks of a sequence.
#pragma once
#include "gated_delta/chunk_fwd_config.cuh"
#include "gated_delta/chunk_state.cuh"

namespace df::cuda {
// c_ij <- c_ij factor_j
template <int kN>
__device__ inline void scale_columns(float (&c)[kN][4], const float* factor) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const float2 f = *reinterpret_cast<const float2*>(factor + fragment_col(n, 0));
    c[n][0] *= f.x, c[n][1] *= f.y, c[n][2] *= f.x, c[n][3] *= f.y;
  }
}

// r_ij <- v_ij - factor_j r_ij
template <class E, int kC>
__device__ inline void subtract_from(const Fragment<E, kC>& v, const float* factor,
                                     float (&r)[kC / 8][4]) {
  scale_columns(r, factor);
#pragma unroll
  for (int n = 0; n < kC / 8; ++n)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 x;
      if constexpr (sizeof(E) == 2)
        x = unpack<E>(v.r[n / 2][n % 2 * 2 + half]);
      else
        x = {v.r[n][2 * half], v.r[n][2 * half + 1]};
      r[n][2 * half] = x.x - r[n][2 * half], r[n][2 * half + 1] = x.y - r[n][2 * half + 1];
    }
}

// kCols columns of an accumulator.
template <int kCols, int kN>
__device__ inline float (&columns(float (&c)[kN][4], int first))[kCols / 8][4] {
  return reinterpret_cast<float(&)[kCols / 8][4]>(c[first / 8]);
}

// An operand A as one fragment, or, in high precision, as the sum of two.
template <class E, int kK, bool kHigh>
struct Factor {
  Fragment<E, kK> high, low;
  __device__ void set(const float (&c)[kK / 8][4]) {
    if constexpr (kHigh)
      split_fragment<E, kK>(c, high, low);
    else
      to_fragment<E, kK>(c, high);
  }
  template <class Arch>
  __device__ void begin() {
    if constexpr (kHigh)
      Arch::begin(high, low);
    else
      Arch::begin(high);
  }
  template <class Arch>
  __device__ void finished() {
    if constexpr (kHigh)
      Arch::template wait<0>(high, low);
    else
      Arch::template wait<0>(high);
  }
  // c += a b; b is `first` or, of two parts, also `second`.
  template <class Arch, int kN, bool kPair, Major kMajor>
  __device__ void multiply(float (&c)[kN / 8][4], Operand<E, kMajor> first,
                           Operand<E, kMajor> second) {
    Arch::template mma<kN>(c, high, first);
    if constexpr (kPair) Arch::template mma<kN>(c, high, second);
    if constexpr (kHigh) Arch::template mma<kN>(c, low, first);
  }
};

template <class F>
struct StateGroup {
  using Arch = typename F::Arch;
  using E = typename F::E;
  using Square = typename F::Square;
  static constexpr int kC = F::kC, kK = F::kK;
  // One after the other: columns that are operand A at once, columns of a triangular product.
  static constexpr int kStep = F::kAsync ? 32 : sizeof(E) == 2 ? 16 : 8;
  static constexpr int kTokens = F::kAsync ? kC : 32;
  static constexpr int kPart = sizeof(E) == 4 ? 16 : kK;  // columns of K between two branches
  static constexpr bool kPairT = F::Work::kParts == 2, kPairP = F::kAttention == 2;
  using Step = Factor<E, kStep, F::kHigh>;
  using Whole = Factor<E, kC, F::kHigh>;
  using State = Fragment<E, kK>;

  const ChunkFwdCuda& p;
  const Walk& w;
  const FwdShared<F>& shared;
  float S[kK / 8][4];

  __device__ int group() const { return thread_anew() / 128 - 1; }
  __device__ int v0() const { return w.v0 + 64 * group(); }

  __device__ void run() {
    enter();
    for (int c = 0; c < w.chunks; ++c) {
      shared.rest->pipe.wait_ready(c);
      if constexpr (F::kAsync) shared.rest->pipe.wait_loaded(c);
      save(c);
      if constexpr (F::kTogether)
        together(c);
      else
        in_turn(c);
      shared.rest->pipe.arrive_done(c);
    }
    leave();
  }

 private:
  // The state of the whole sequence, in the layout of the tensors.
  __device__ int64_t outer() const {
    const ChunkShape& shape = p.in.shape;
    return (int64_t(w.n) * shape.HV + w.head) * shape.K * shape.V;
  }
  // 64 rows of S^T, or of M^T behind them, that this group has of a segment; padded.
  __device__ float* inner() const {
    const int64_t K = pad64(p.in.shape.K), V = pad64(p.in.shape.V);
    const int64_t at = int64_t(w.segment) * p.in.shape.HV + w.head;
    if (v0() < V) return p.segments.states + (at * V + v0()) * K;
    return p.segments.transitions + (at * K + v0() - V) * K;
  }
  __device__ ChunkShape padded() const {
    ChunkShape shape = p.in.shape;
    shape.K = pad64(shape.K), shape.V = 64;
    return shape;
  }
  __device__ void enter() {
    const ChunkShape& shape = p.in.shape;
    const int below = v0() - int(pad64(shape.V));
    if (p.summary && below >= 0) {  // rows of the identity
#pragma unroll
      for (int n = 0; n < kK / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) S[n][i] = below + fragment_row(i) == fragment_col(n, i);
    } else if (w.first) {
      const float* const from = p.initial_state;
      load_state(from ? from + outer() : from, p.in.state_v_first, shape, v0(), S);
    } else {
      load_state(p.summary ? nullptr : inner(), true, padded(), 0, S);
    }
  }
  __device__ void leave() {
    if (p.summary)
      store_state(inner(), true, padded(), 0, S);
    else if (p.final_state && w.last)
      store_state(p.final_state + outer(), p.in.state_v_first, p.in.shape, v0(), S);
  }

  __device__ void load_values(int c, Fragment<E, kC>& v) const {
    if constexpr (sizeof(E) == 2) {
      load_fragment<kC>(v, shared.values(c).along_mn().from(0, 64 * group()));
    } else {  // the same, with addresses that are not kept from chunk to chunk
      const int thread = thread_anew(), token = thread % 4 * 2;
      const int col = 64 * group() + thread % 128 / 32 * 16 + thread % 32 / 4;
#pragma unroll
      for (int k = 0; k < kC / 8; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          v.r[k][i] = sm80::load_one(shared.values(c).at(8 * k + token + i % 2, col + i / 2 * 8));
    }
  }

  // S^T as it enters the chunk.
  __device__ void save(int c) {
    if (!p.states.data) return;
    const int stride = w.padded_k;
    E* const to = static_cast<E*>(p.states.data) + (w.sequence.slot + c) * p.states.slot +
                  w.head * p.states.head + int64_t(v0()) * stride;
    store_rounded(S, to, stride);
  }

  // The chunk with O and the state's update side by side, and R and Y.
  __device__ void together(int c) {
    const auto& tokens = shared.tokens(c);
    const auto k = shared.keys(c).along_k();
    float r[kC / 8][4], y[kC / 8][4], u[kC / 8][4];
    State s;
    clear<kC>(r), clear<kC>(y), clear<kC>(u);
    to_fragment<E, kK>(S, s);
    Arch::begin(r, y, s);
    Arch::template mma<kC>(r, s, k);
    Arch::commit();
    if (p.o) Arch::template mma<kC>(y, s, k.from(kC, 0));
    Arch::commit();
    Fragment<E, kC> v;
    load_values(c, v);
    Arch::template wait<1>(r);
    subtract_from<E, kC>(v, tokens.gam, r);

    Whole a, d;
    a.set(r);
    Arch::begin(u), a.template begin<Arch>();
    const uint32_t inverse = shared.inverse(c), attention = shared.attention(c);
    a.template multiply<Arch, kC, kPairT>(u, Square{inverse}.along_k(),
                                          Square{inverse + Square::kBytes}.along_k());
    Arch::commit();
    Arch::template wait<0>(u, y, s), a.template finished<Arch>();

    scale_columns(u, tokens.beta);
    a.set(u);
    scale_columns(u, tokens.del);
    d.set(u);
    scale_columns(y, tokens.rq);
    scale_all(S, tokens.chunk_decay);
    Arch::begin(S, y), a.template begin<Arch>(), d.template begin<Arch>();
    const auto rows = shared.keys(c).along_mn();
    d.template multiply<Arch, kK, false>(S, rows, rows);
    Arch::commit();
    if (p.o)
      a.template multiply<Arch, kC, kPairP>(y, Square{attention}.along_k(),
                                            Square{attention + Square::kBytes}.along_k());
    Arch::commit();
    Arch::template wait<0>(S, y), a.template finished<Arch>(), d.template finished<Arch>();
    if (p.o) write<kC>(c, 0, y);
  }

  // Whether K ends before column k, asked before each part of floats, which are two registers each
  // in a product, and a sum more for each tile of a step: where no branch keeps it from that, ptxas
  // begins more steps at once than there are registers for.
  __device__ bool ends_before(int k) const {
    return sizeof(E) == 4 && k % kPart == 0 && k >= int(p.in.shape.K);
  }

  // x = S^T b^T for the rows of k, or, second, of q.
  __device__ void read(int c, int pass, float (&x)[kC / 8][4]) {
    clear<kC>(x);
#pragma unroll
    for (int k = 0; k < kK; k += kStep) {
      if (ends_before(k)) break;
      Fragment<E, kStep> s;
      to_fragment<E, kStep>(columns<kStep>(S, k), s);
      Arch::begin(x, s);
      Arch::template mma<kC>(x, s, shared.keys(c).along_k().from(0, k).from(pass * kC, 0));
      Arch::commit();
      Arch::template wait<0>(x, s);
    }
  }
  // x += a b^T for a lower triangular b, by kTokens columns of x.
  template <bool kPair>
  __device__ void lower(float (&x)[kC / 8][4], float (&a)[kC / 8][4], uint32_t b) {
#pragma unroll
    for (int j = 0; j < kC; j += kStep) {
      Step s;
      s.set(columns<kStep>(a, j));
#pragma unroll
      for (int i = 0; i < kC; i += kTokens) {
        if (i + kTokens <= j) continue;
        auto& part = columns<kTokens>(x, i);
        Arch::begin(part), s.template begin<Arch>();
        s.template multiply<Arch, kTokens, kPair>(part, Square{b}.along_k().from(i, j),
                                                  Square{b + Square::kBytes}.along_k().from(i, j));
        Arch::commit();
        Arch::template wait<0>(part), s.template finished<Arch>();
      }
    }
  }

  // The chunk with one product after the other. R and Y are passes of one loop: otherwise the
  // compiler keeps the rounded S of the first for the second, in registers that there are not.
  __device__ void in_turn(int c) {
    float u[kC / 8][4];
    clear<kC>(u);
#pragma unroll 1
    for (int pass = 0; pass < (p.o ? 2 : 1); ++pass) {
      float x[kC / 8][4];
      read(c, pass, x);
      c = anew(c);  // addresses of this pass alone
      const auto& tokens = shared.tokens(c);
      if (pass == 0) {
        Fragment<E, kC> v;
        load_values(c, v);
        subtract_from<E, kC>(v, tokens.gam, x);
        lower<kPairT>(u, x, shared.inverse(c));
        scale_columns(u, tokens.beta);
      } else {
        scale_columns(x, tokens.rq);
        lower<kPairP>(x, u, shared.attention(c));
        write<kC>(c, 0, x);
      }
    }
    const auto& tokens = shared.tokens(c);
    scale_columns(u, tokens.del);
    const float decay = tokens.chunk_decay;
#pragma unroll
    for (int j = 0; j < kC; j += kStep) {
      Step s;
      s.set(columns<kStep>(u, j));
      const auto rows = shared.keys(c).along_mn().from(j, 0);
#pragma unroll
      for (int k = 0; k < kK; k += kPart) {
        if (ends_before(k)) break;
        auto& part = columns<kPart>(S, k);
        if (j == 0) scale_all(part, decay);
        Arch::begin(part), s.template begin<Arch>();
        s.template multiply<Arch, kPart, false>(part, rows.from(0, k), rows.from(0, k));
      }
      Arch::commit();
      Arch::template wait<0>(S), s.template finished<Arch>();
    }
  }

  // O of the chunk's tokens from `first` on, through the rows of v that this warp alone has read.
  template <int kN>
  __device__ void write(int c, int first, float (&y)[kN / 8][4]) const {
    const ChunkShape& shape = p.in.shape;
    const TileRows<typename F::Values, kN> tile{shared.values(c), first};
    __syncwarp();
    store_transposed<kN>(y, tile, 64 * group());
    __syncwarp();
    const int64_t token = w.sequence.batch * shape.T + w.sequence.begin + int64_t(c) * kC + first;
    E* const to = static_cast<E*>(p.o) + (token * shape.HV + w.head) * shape.V + v0();
    store_output(tile, 64 * group(), to, shape.HV * shape.V, w.template rows<kC>(c) - first,
                 int(shape.V) - v0(), shape.V % (16 / int(sizeof(E))) == 0,
                 [] { Arch::stores_visible(); });
  }
};
}  // namespace df::cuda
