// T' = (I + A)^-1, A = strictlower(Gam o KK^T) diag(beta), of every chunk and value head of 16-bit
// inputs, as a sum of two squares of their type (gated_delta.md, 2.3 and 4.4). A kernel of its own,
// all chunks side by side: the inversion is a long chain of short steps, which four warps alone on
// an SM, ahead of the state's, cannot hide; and segments, halves of V and the backward share it.
//
// CTA = (slot, q/k head), 128 threads, five CTAs an SM (K > 128: three). Of each value head of the
// group:
//   KK^T (again: kept, it would cost a CTA an SM), decays and beta to A (float, shared memory),
//   blocks of 16 by substitution, joined in pairs by 3xTF32 (chunk_inverse.cuh), rounded in place
//   and copied out; warp 3 makes the next head's table
// Shared memory: k 128 K bytes, A 16 KB, two tables of tokens 4 KB: 36 KB for K = 128. Registers:
// at most 96 (K > 128: 120): 32 of A, 40 of the blocks.
// Bytes: 128 K a slot and q/k head in, 16 KB a slot and value head out. FLOPs: 1.3 M a value head.
// Bound by latency and the bytes that leave.
#pragma once
#include "gated_delta/chunk_fwd_cuda.h"
#include "gated_delta/chunk_squares.cuh"

namespace df::cuda {
template <class E_, int kK_>
struct InverseCta {
  using E = E_;
  static constexpr int kK = kK_, kC = 64, kThreads = 128, kBarrier = 1;
  using Keys = Tile<E, kC, kK>;
  using System = Tile<float, kC, kC>;
  struct Tables {              // in shared memory: what would take many registers
    TokenTable<kC> tokens[2];  // of this head and the next
    ChunkPlace place;
    int64_t slot;
  };
  static constexpr int kShared = Keys::kBytes + System::kBytes + int(sizeof(Tables));

  const ChunkFwdCuda& p;
  Keys keys;
  System a;
  Tables& tables;

  __device__ TokenTable<kC>& tokens(int head) const { return tables.tokens[head % 2]; }
  __device__ int64_t first() const { return tables.place.sequence.begin + tables.place.chunk * kC; }
  __device__ static void barrier() { named_barrier_sync(kBarrier, kThreads); }

  struct Next {  // a head's table while the one before is inverted, by one warp
    const InverseCta& of;
    int head;
    bool exists;
    LaneTokens<kC> lane{};
    __device__ void request() {
      if (exists)
        fetch_tokens(of.p.in, of.tables.place.sequence.batch, of.first(), of.tables.place.rows,
                     head, lane);
    }
    __device__ void run() const {
      if (!exists) return;
      make_tokens(of.p.in, lane, of.tables.place.rows, head, of.tokens(head));
      for (int i = threadIdx.x % 32; i < kC; i += 32)
        of.tokens(head).rk[i] = of.tokens(head + 1).rk[i];
    }
  };

  // Keys, their norms, the first head's table.
  __device__ void load(int key_head, int head) const {
    const ChunkPlace& place = tables.place;
    const Place at{place.sequence.batch, first(), key_head, place.rows, 0, int(p.in.shape.K)};
    load_rows<kThreads>(keys, p.in.k, at, p.vectors, threadIdx.x);
    cp_async_commit();
    if (threadIdx.x < 32)
      load_tokens(p.in, place.sequence.batch, first(), place.rows, head, tokens(head));
    cp_async_wait<0>();
    barrier();
    row_norms<kThreads>(keys, p.in.l2norm, threadIdx.x, tokens(head).rk);
    barrier();
  }

  __device__ void store(int head) const {
    barrier();
    const int thread = thread_anew();
    E* const to =
        static_cast<E*>(p.inverse.data) + tables.slot * p.inverse.slot + head * p.inverse.head;
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const Tile<E, kC, kC> tile{a.base + part * Tile<E, kC, kC>::kBytes};
#pragma unroll
      for (int i = 0; i < kC * 8 / kThreads; ++i) {
        const int unit = i * kThreads + thread;
        __stcg(reinterpret_cast<float4*>(to + part * kC * kC) + unit,
               load_shared4(tile.at(unit / 8, unit % 8 * 8)));
      }
    }
  }

  __device__ void run(int key_head) const {
    const int group = int(p.in.shape.HV / p.in.shape.H), warp = threadIdx.x / 32;
    const int end = (key_head + 1) * group;
    load(key_head, end - group);
#pragma unroll 1
    for (int head = end - group; head < end; ++head) {
      float x[kC / 8][4];
      clear<kC>(x);
      const Keys again{uint32_t(anew(int(keys.base))) & ~1023u};  // no addresses across heads
      Sm80::mma<kC, kK>(x, again.along_k(), again.along_k());
      Next next{*this, head + 1, head + 1 < end};
      const TokenTable<kC>& t = tokens(head);
      if (warp == 3) next.request();
      LaneDecays<kC>(t, warp).template apply<true>(1, t.rk, t.beta, x);
      store_tile<kC>(x, a);
      invert_square<E>(a, kBarrier, next);
      store(head);
      barrier();
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kK <= 128 ? 5 : 3)
    chunk_inverse_kernel(const __grid_constant__ ChunkFwdCuda p) {
  extern __shared__ __align__(1024) char shared[];
  constexpr int kTables = C::Keys::kBytes + C::System::kBytes;
  auto& tables = *reinterpret_cast<typename C::Tables*>(shared + kTables);
  const int64_t H = p.in.shape.H;
  if (threadIdx.x == 0) tables.slot = blockIdx.x / H, tables.place = chunk_place(p.in, tables.slot);
  __syncthreads();
  if (tables.place.rows == 0) return;
  const uint32_t base = shared_address(shared) & ~1023u;  // which it is: for the compiler
  C{p, {base}, {base + C::Keys::kBytes}, tables}.run(int(blockIdx.x % H));
}

template <class C>
int chunk_inverse_launch(const ChunkFwdCuda& p, void* stream) {
  const cudaError_t e = cudaFuncSetAttribute(
      chunk_inverse_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize, C::kShared);
  if (e != cudaSuccess) return e;
  chunk_inverse_kernel<C><<<unsigned(p.in.slots() * p.in.shape.H), C::kThreads, C::kShared,
                            static_cast<cudaStream_t>(stream)>>>(p);
  return cudaSuccess;
}
template <class E>
int chunk_inverse_dispatch(const ChunkFwdCuda& p, void* stream) {
  if (p.in.shape.K <= 64) return chunk_inverse_launch<InverseCta<E, 64>>(p, stream);
  if (p.in.shape.K <= 128) return chunk_inverse_launch<InverseCta<E, 128>>(p, stream);
  return chunk_inverse_launch<InverseCta<E, 256>>(p, stream);
}
}  // namespace df::cuda
