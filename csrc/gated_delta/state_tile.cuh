// A tile of a float state in the registers of a CTA, for the per-token form: kLanes neighbouring
// lanes share the K of kRows value columns and hold kSlice elements of each. Which lane has what
// does not depend on the layout in memory or on the number of warps, and neither do the bits:
//   element n of lane l is row (n / 4 kLanes + l) 4 + n % 4 of K
// A warp's 128-bit accesses fill whole sectors in both layouts: 128 or 256 bytes of a row of K
// (v-first), 32 or 64 bytes of V in each of several rows (k-first).
#pragma once
#include "common/cuda/load.cuh"
#include "common/cuda/pack.cuh"
#include "gated_delta/input.h"

namespace df::cuda {
template <int kTileK_>
struct StateTile {
  static constexpr int kTileK = kTileK_;  // the largest K
  static constexpr int kLanes = kTileK > 128 ? 16 : 8, kSlice = kTileK / kLanes, kRows = 4;
  static constexpr int kRowsPerWarp = 32 / kLanes * kRows;
  static constexpr int k(int lane, int n) { return (n / 4 * kLanes + lane) * 4 + n % 4; }
  using Registers = float[kRows][kSlice];
};

struct StatePlace {  // in a tensor of states: this thread's lane, and the first of its columns
  int64_t first;     // element of the state
  int K, V, lane, v;
  bool v_first, vectors;  // vectors: 128 bits are aligned, and whole along the last dimension
};

// fn(r, n, place) for pieces of kCount elements that are inside; they run along n or along r.
template <class C, bool kVFirst, int kCount, class Fn>
__device__ inline void each_piece(const StatePlace& at, Fn fn) {
#pragma unroll
  for (int r = 0; r < C::kRows; r += kVFirst ? 1 : kCount)
#pragma unroll
    for (int n = 0; n < C::kSlice; n += kVFirst ? kCount : 1) {
      const int v = at.v + r, k = C::k(at.lane, n);
      if (v < at.V && k < at.K) fn(r, n, at.first + (kVFirst ? v * at.K + k : k * at.V + v));
    }
}

template <class C, bool kVFirst, int kCount>
__device__ inline void load_pieces(const float* from, const StatePlace& at,
                                   typename C::Registers& S) {
  each_piece<C, kVFirst, kCount>(at, [&](int r, int n, int64_t place) {
    float x[kCount];
    load_vector<kCount>(from + place, x);
#pragma unroll
    for (int w = 0; w < kCount; ++w) (kVFirst ? S[r][n + w] : S[r + w][n]) = x[w];
  });
}
template <class C, bool kVFirst, int kCount>
__device__ inline void store_pieces(float* to, const StatePlace& at,
                                    const typename C::Registers& S) {
  each_piece<C, kVFirst, kCount>(at, [&](int r, int n, int64_t place) {
    float x[kCount];
#pragma unroll
    for (int w = 0; w < kCount; ++w) x[w] = kVFirst ? S[r][n + w] : S[r + w][n];
    store_vector<kCount>(to + place, x);
  });
}

// Without a tensor, and outside the state: zeros.
template <class C>
__device__ inline void load_state(const void* state, const StatePlace& at,
                                  typename C::Registers& S) {
#pragma unroll
  for (int r = 0; r < C::kRows; ++r)
#pragma unroll
    for (int n = 0; n < C::kSlice; ++n) S[r][n] = 0;
  const float* const from = static_cast<const float*>(state);
  if (!from) return;
  if (at.vectors)
    at.v_first ? load_pieces<C, true, 4>(from, at, S) : load_pieces<C, false, 4>(from, at, S);
  else
    at.v_first ? load_pieces<C, true, 1>(from, at, S) : load_pieces<C, false, 1>(from, at, S);
}
template <class C>
__device__ inline void store_state(void* state, const StatePlace& at,
                                   const typename C::Registers& S) {
  float* const to = static_cast<float*>(state);
  if (at.vectors)
    at.v_first ? store_pieces<C, true, 4>(to, at, S) : store_pieces<C, false, 4>(to, at, S);
  else
    at.v_first ? store_pieces<C, true, 1>(to, at, S) : store_pieces<C, false, 1>(to, at, S);
}

// x[r] += sum over this lane's slice of S[r] y; row(n, a) gives y's four elements from n on.
template <class C, class Row>
__device__ inline void read_columns(const typename C::Registers& S, Row row, float (&x)[4]) {
#pragma unroll
  for (int n = 0; n < C::kSlice; n += 4) {
    float a[4];
    row(n, a);
#pragma unroll
    for (int w = 0; w < 4; ++w)
#pragma unroll
      for (int r = 0; r < 4; ++r) x[r] += S[r][n + w] * a[w];
  }
}

// The sum over kLanes lanes of x[row], row being the caller's: lanes l, l ^ 4, ... share one.
__device__ inline int row_of_lane(int lane) {
  return (lane & 1) * 2 + (lane >> 1 & 1);
}
template <int kLanes>
__device__ inline float sum_of_row(const float (&x)[4], int lane) {
  constexpr unsigned kAll = 0xffffffffu;
  const bool upper = lane & 1, odd = lane & 2;
  const float a = (upper ? x[2] : x[0]) + __shfl_xor_sync(kAll, upper ? x[0] : x[2], 1);
  const float b = (upper ? x[3] : x[1]) + __shfl_xor_sync(kAll, upper ? x[1] : x[3], 1);
  float sum = (odd ? b : a) + __shfl_xor_sync(kAll, odd ? a : b, 2);
#pragma unroll
  for (int mask = 4; mask < kLanes; mask *= 2) sum += __shfl_xor_sync(kAll, sum, mask);
  return sum;
}
// What each of the four rows' lanes has, for all of them.
__device__ inline void gather_rows(float x, float (&rows)[4]) {
  const int quad = threadIdx.x & 28;
#pragma unroll
  for (int r = 0; r < 4; ++r) rows[r] = __shfl_sync(0xffffffffu, x, quad | r >> 1 | (r & 1) << 1);
}
}  // namespace df::cuda
