// S^T of a state warpgroup, 64 rows (of V) by K in registers, to and from memory.
#pragma once
#include "common/cuda/transpose.cuh"
#include "gated_delta/chunk_device.cuh"

namespace df::cuda {
// fn(index, inside, element) for this lane's elements of rows v0 on; index: that of a state [K, V],
// or [V, K] v-first; inside: whether the state has it.
template <int kN, class Fn>
__device__ inline void each_element(const ChunkShape& shape, bool v_first, int v0,
                                    float (&c)[kN][4], Fn fn) {
  const int K = int(shape.K), V = int(shape.V);
  const int row_step = v_first ? K : 1, col_step = v_first ? 1 : V;
  const int thread = thread_anew(), k = thread % 4 * 2;
  const int v = v0 + thread % 128 / 32 * 16 + thread % 32 / 4;
  int index = v * row_step + k * col_step;
#pragma unroll
  for (int n = 0; n < kN; ++n, index = anew(index + 8 * col_step))
#pragma unroll
    for (int i = 0; i < 4; ++i)
      fn(index + i / 2 * 8 * row_step + i % 2 * col_step,
         v + i / 2 * 8 < V && k + 8 * n + i % 2 < K, c[n][i]);
}

template <int kN>
__device__ inline void scale_all(float (&c)[kN][4], float factor) {
#pragma unroll
  for (int n = 0; n < kN; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) c[n][i] *= factor;
}

// Null: zeros.
template <int kN>
__device__ inline void load_state(const float* from, bool v_first, const ChunkShape& shape, int v0,
                                  float (&S)[kN][4]) {
  each_element(shape, v_first, v0, S,
               [&](int index, bool inside, float& x) { x = from && inside ? from[index] : 0; });
}
template <int kN>
__device__ inline void store_state(float* to, bool v_first, const ChunkShape& shape, int v0,
                                   float (&S)[kN][4]) {
  each_element(shape, v_first, v0, S, [&](int index, bool inside, float& x) {
    if (inside) to[index] = x;
  });
}

// S^T in the inputs' type to rows of `stride` elements, a multiple of 64: that many columns.
template <class E, int kN>
__device__ inline void store_rounded(const float (&S)[kN][4], E* to, int stride) {
  const int thread = thread_anew(), row = thread % 128 / 32 * 16 + thread % 32 / 4;
  E* at = to + row * stride + thread % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half, at += 8 * stride)
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (8 * n >= stride) break;
      const float x = S[n][2 * half], y = S[n][2 * half + 1];
      if constexpr (sizeof(E) == 2)
        *reinterpret_cast<uint32_t*>(at + 8 * n) = pack<E>(x, y);
      else
        *reinterpret_cast<float2*>(at + 8 * n) = {x, y};
    }
}

// Sixteen bytes to elements that may lie anywhere, the first `count` of them.
template <class E>
__device__ inline void store_elements(E* to, const float4& x, int count) {
  const float words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int e = 0; e < 16 / int(sizeof(E)); ++e) {
    if (e >= count) break;
    if constexpr (sizeof(E) == 2)
      to[e].bits = uint16_t(__float_as_uint(words[e / 2]) >> e % 2 * 16);
    else
      to[e] = words[e];
  }
}

// The 16 columns of this warp in a tile of tokens to `rows` rows of a tensor, of whose `cols`
// columns the first is the tile's first. Eight lanes meet no bank twice. was_read() is called when
// the tile has been, for whole tiles before the stores: a fence there would wait for them.
template <class T, class Fn>
__device__ inline void store_output(const T& tile, int first_col, typename T::E* to, int64_t stride,
                                    int rows, int cols, bool vectors, Fn was_read) {
  using E = typename T::E;
  constexpr int kUnit = 16 / int(sizeof(E)), kUnits = 16 / kUnit;
  constexpr int kStep = 32 / kUnits;  // rows at once: whole periods of the tile's permutation
  const int thread = thread_anew(), rank = thread % 32 / kUnits;
  const int row = rank / 8 * 8 + rank % 4 * 2 + rank / 4 % 2;
  const int col = thread % 128 / 32 * 16 + thread % kUnits * kUnit;
  const uint32_t from = tile.at(row, first_col + col);
  E* const first = to + row * stride + col;
  if (vectors && rows >= T::kRows && cols >= 64) {
    float4 x[T::kRows / kStep];
#pragma unroll
    for (int i = 0; i < T::kRows / kStep; ++i) x[i] = load_shared4(from + i * kStep * 128);
    was_read();
#pragma unroll
    for (int i = 0; i < T::kRows / kStep; ++i)
      __stcg(reinterpret_cast<float4*>(first + i * kStep * stride), x[i]);
    return;
  }
#pragma unroll 1
  for (int i = 0; row + i < rows && i < T::kRows; i += kStep)
    store_elements(first + i * stride, load_shared4(from + i * 128), cols - col);
  was_read();
}
}  // namespace df::cuda
