// Rotation of q and k in coordinate planes (equations in rotary.h), one launch for both:
//   y0 = x0 C - x1 S,  y1 = x0 S + x1 C
//
// CTA = (1 to 8 tokens, a group of angle heads; with shared angles all heads of q and k), 256
// threads. Prologue: the angle of each (token, angle head, plane) once, a 64-bit product that wraps
// modulo whole turns and a polynomial, into shared memory. Sweep: a thread keeps its place in a row
// and takes (token, head) after (token, head); it holds 16 bytes of x0 and of x1 (half layout) or
// 16 bytes of pairs (interleaved), two or four rows at once: four independent 128-bit loads are in
// flight, of float in half layout eight. Every element is read and written once, by the same
// thread: in place is safe.
// Rows that are no whole 16-byte pieces take the variant with kVec = 1, a plane a thread.
//
// Shared memory: 8 bytes (16 where q and k have tables of their own) a token, angle head and plane,
// at most 32 KB: 512 bytes a token for D = 128. Reads are free of bank conflicts.
// Registers: at most 102, no spills; two CTAs an SM have 32 KB of loads in flight, or 64.
// Bytes: 2 e D a token and head out of place, 2 e 2P in place, frequencies from the L2 cache.
// FLOPs: 6 P a token and head, some 60 integer operations an angle. Bound by memory.
#pragma once
#include "grape/rotary_token.cuh"

namespace df::cuda {
constexpr int kRotaryThreads = 256;

template <class E_, int kVec_, bool kInterleaved_>
struct RotaryConfig {
  using E = E_;
  static constexpr int kVec = kVec_;                           // elements an access
  static constexpr bool kInterleaved = kInterleaved_;          // pairs within an access
  static constexpr int kRun = kInterleaved ? kVec / 2 : kVec;  // planes of a thread
  // rows in flight: 128 bytes a thread of float, else what registers have room for
  static constexpr int kUnroll = kInterleaved || sizeof(E) == 4 ? 4 : 2;
};

// One thread's elements of a row; kVec = 1 knows the layout at run time only.
template <class C>
struct RotaryPair {
  float x0[C::kRun], x1[C::kRun];

  __device__ void load(const typename C::E* row, int plane, int P, bool interleaved) {
    if constexpr (C::kInterleaved) {
      float x[C::kVec];
      load_vector<C::kVec>(row + 2 * plane, x);
#pragma unroll
      for (int i = 0; i < C::kRun; ++i) x0[i] = x[2 * i], x1[i] = x[2 * i + 1];
    } else {
      const bool pairs = C::kVec == 1 && interleaved;
      load_vector<C::kVec>(row + (pairs ? 2 * plane : plane), x0);
      load_vector<C::kVec>(row + (pairs ? 2 * plane + 1 : P + plane), x1);
    }
  }
  __device__ void store(typename C::E* row, int plane, int P, bool interleaved) const {
    if constexpr (C::kInterleaved) {
      float x[C::kVec];
#pragma unroll
      for (int i = 0; i < C::kRun; ++i) x[2 * i] = x0[i], x[2 * i + 1] = x1[i];
      store_vector<C::kVec>(row + 2 * plane, x);
    } else {
      const bool pairs = C::kVec == 1 && interleaved;
      store_vector<C::kVec>(row + (pairs ? 2 * plane : plane), x0);
      store_vector<C::kVec>(row + (pairs ? 2 * plane + 1 : P + plane), x1);
    }
  }
  // By cos and sin at `angles`.
  __device__ void rotate(const float* angles, int plane, int P) {
    float c[C::kRun], s[C::kRun];
    rotary_read<C::kRun>(angles, plane, P, c);
    rotary_read<C::kRun>(angles + P, plane, P, s);
#pragma unroll
    for (int i = 0; i < C::kRun; ++i) {
      const float a = x0[i], b = x1[i];
      x0[i] = a * c[i] - b * s[i], x1[i] = a * s[i] + b * c[i];
    }
  }
};

// The heads of q, then those of k, that share `count` angle heads from ha0 on.
struct RotaryRows {
  int ha0, group_q, group_k, of_q, per_token;

  __device__ RotaryRows(const RotaryArgs& p, int ha0_, int count)
      : ha0(ha0_),
        group_q(int(p.q.H / p.Ha)),
        group_k(int(p.k.H / p.Ha)),
        of_q(count * group_q),
        per_token(count * (group_q + group_k)) {}

  __device__ bool is_k(int row) const { return row >= of_q; }
  __device__ int head(int row) const {
    return is_k(row) ? ha0 * group_k + row - of_q : ha0 * group_q + row;
  }
  __device__ int angle_head(int row) const {  // counted from ha0
    return is_k(row) ? (row - of_q) / group_k : row / group_q;
  }
};

template <class Heads>
__device__ inline int64_t rotary_offset(const Heads& x, const RotaryToken& at, int head) {
  return at.b * x.b + at.t * x.t + head * x.h;
}

template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

// Channels from 2 P on, of rows that are not rotated in place.
template <class C>
__device__ inline void rotary_rest(const RotaryArgs& p, const RotaryToken* sTokens, int tokens,
                                   const RotaryRows& rows) {
  using E = typename C::E;
  const int rest = int(p.D - 2 * p.P);
  if (rest == 0) return;
  const auto copy = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int pieces = rest / kWidth;
    for (int i = threadIdx.x; i < tokens * rows.per_token * pieces; i += blockDim.x) {
      const int row = i / pieces % rows.per_token, head = rows.head(row);
      const RotaryToken& at = sTokens[i / pieces / rows.per_token];
      const RotaryHeads& from = rows.is_k(row) ? p.k : p.q;
      const RotaryOutput& to = rows.is_k(row) ? p.y_k : p.y_q;
      const int64_t c = 2 * p.P + i % pieces * kWidth;
      const E* x = static_cast<const E*>(from.data) + rotary_offset(from, at, head) + c;
      E* y = static_cast<E*>(to.data) + rotary_offset(to, at, head) + c;
      if (x == y) continue;
      if constexpr (kWidth == 1)
        *y = *x;
      else
        __stcg(reinterpret_cast<uint4*>(y), __ldcg(reinterpret_cast<const uint4*>(x)));
    }
  };
  if (rest % C::kVec == 0)
    copy(Width<C::kVec>{});
  else
    copy(Width<1>{});
}

template <class C>
__global__ void __launch_bounds__(kRotaryThreads, 2)
    rotary_kernel(const __grid_constant__ RotaryArgs p, int tokens_each, int heads_each) {
  using E = typename C::E;
  extern __shared__ float4 shared[];
  __shared__ RotaryToken sTokens[8];
  float* const sAngles = reinterpret_cast<float*>(shared);
  const int P = int(p.P), groups = int((p.Ha + heads_each - 1) / heads_each);
  const int64_t n0 = blockIdx.x / groups * int64_t(tokens_each);
  const int ha0 = int(blockIdx.x % groups) * heads_each;
  const int count = min(heads_each, int(p.Ha) - ha0);
  const int tokens = int(min(int64_t(tokens_each), p.B * p.T - n0));
  if (threadIdx.x < tokens) sTokens[threadIdx.x] = rotary_token(p, n0 + threadIdx.x);
  __syncthreads();
  rotary_stage<C::kRun>(p, sTokens, tokens, ha0, count, sAngles);
  __syncthreads();

  const RotaryRows rows(p, ha0, count);
  rotary_rest<C>(p, sTokens, tokens, rows);
  const int runs = P / C::kRun, total = tokens * rows.per_token;
  if (runs == 0) return;
  const int across = min(runs, kRotaryThreads), stride = kRotaryThreads / across;
  const bool interleaved = p.interleaved, distinct = p.cos_k.data != nullptr;
  if (int(threadIdx.x) >= across * stride) return;
  for (int run = threadIdx.x % across; run < runs; run += across) {
    const int plane = run * C::kRun;
    for (int r = threadIdx.x / across; r < total; r += C::kUnroll * stride) {
      RotaryPair<C> x[C::kUnroll];
      E* to[C::kUnroll];
      int angles[C::kUnroll];
#pragma unroll
      for (int u = 0; u < C::kUnroll; ++u) {
        const int i = r + u * stride;
        if (i >= total) break;
        const int token = i / rows.per_token, row = i - token * rows.per_token;
        const bool k = rows.is_k(row);
        const int head = rows.head(row);
        const RotaryToken& at = sTokens[token];
        const RotaryHeads& from = k ? p.k : p.q;
        const RotaryOutput& out = k ? p.y_k : p.y_q;
        x[u].load(static_cast<const E*>(from.data) + rotary_offset(from, at, head), plane, P,
                  interleaved);
        to[u] = static_cast<E*>(out.data) + rotary_offset(out, at, head);
        const int ha = p.Ha == 1 ? 0 : rows.angle_head(row);
        angles[u] = (((k && distinct ? tokens : 0) + token) * count + ha) * 2 * P;
      }
#pragma unroll
      for (int u = 0; u < C::kUnroll; ++u) {
        if (r + u * stride >= total) break;
        x[u].rotate(sAngles + angles[u], plane, P);
        x[u].store(to[u], plane, P, interleaved);
      }
    }
  }
}
}  // namespace df::cuda
