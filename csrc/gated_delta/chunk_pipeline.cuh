// How the chain kernels get their operands: a walk over the chunks of a sequence, the barriers
// between a warpgroup that prepares chunks ahead and the warpgroups that own the state, and loads
// of a chunk's rows, by TMA or by threads.
#pragma once
#include <cuda.h>

#include "gated_delta/chunk_device.cuh"

namespace df::cuda {
template <class E>
inline constexpr int kChunk = sizeof(E) == 2 ? 64 : 32;

// One value head of a sequence or of a segment of it, a tile of columns of V from v0 on. In shared
// memory: it would take many registers.
struct Walk {
  Span sequence;  // its tokens; the slot of its first chunk
  int n, head, key_head, v0;
  int chunks;        // -1: there is nothing to do
  int segment;       // its slot
  int padded_k;      // K to whole 64
  bool first, last;  // of its sequence
  template <int kC>
  __device__ int rows(int chunk) const {
    const int64_t left = sequence.end - sequence.begin - int64_t(chunk) * kC;
    return left < kC ? int(left) : kC;
  }
};

// Blocks are numbered by tiles, then heads, then sequences or segments of `length` chunks: heads of
// a group are neighbours and find q and k in L2.
template <int kC>
__device__ inline Walk walk_of(const ChunkCuda& p, int64_t length, int64_t block, int64_t tiles,
                               int tile_v) {
  const int64_t row = block / tiles, item = row / p.shape.HV;
  Walk w;
  w.head = int(row % p.shape.HV), w.key_head = w.head / int(p.shape.HV / p.shape.H);
  w.v0 = int(block % tiles) * tile_v, w.segment = int(item);
  w.n = int(item), w.first = w.last = true;
  w.padded_k = int(pad64(p.shape.K));
  int64_t chunk = 0;
  if (length) {
    const ChunkPlace place = chunk_place(p, item, kC * length);
    w.n = int(place.n), chunk = place.chunk * length;
    w.first = place.chunk == 0;
    if (!w.first && place.rows == 0) {
      w.chunks = -1;
      return w;
    }
  }
  w.sequence = sequence_span(p, w.n);
  w.sequence.begin += chunk * kC, w.sequence.slot += chunk;
  if (length && w.sequence.begin + length * kC < w.sequence.end)
    w.sequence.end = w.sequence.begin + length * kC, w.last = false;
  w.chunks = int((w.sequence.end - w.sequence.begin + kC - 1) / kC);
  return w;
}

// Chunk c has the tiles of stage c % kStages and the tables of stage c % kTables.
//   loaded[stage]   its rows came by TMA
//   ready[table]    everything the state warpgroups read is there
//   done[stage]     they have read it all
template <int kStages_, int kTables_>
struct Pipeline {
  static constexpr int kStages = kStages_, kTables = kTables_;
  uint64_t loaded[kStages], done[kStages], ready[kTables];

  __device__ void init(int ahead_threads, int state_warps) {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(&loaded[i], 1);
      mbarrier_init(&done[i], state_warps);
    }
    for (int i = 0; i < kTables; ++i) mbarrier_init(&ready[i], ahead_threads);
#if __CUDA_ARCH__ >= 900
    mbarrier_fence_init();
#endif
  }
  __device__ void wait_loaded(int chunk) {
    mbarrier_wait(&loaded[uint32_t(chunk) % kStages], uint32_t(chunk) / kStages & 1);
  }
  __device__ void wait_ready(int chunk) {
    mbarrier_wait(&ready[uint32_t(chunk) % kTables], uint32_t(chunk) / kTables & 1);
  }
  __device__ void arrive_ready(int chunk) { mbarrier_arrive(&ready[uint32_t(chunk) % kTables]); }
  // Nothing to wait for before the first chunk.
  __device__ void wait_done(int chunk) {
    if (chunk >= 0) mbarrier_wait(&done[uint32_t(chunk) % kStages], uint32_t(chunk) / kStages & 1);
  }
  __device__ void arrive_done(int chunk) {  // by whole warps
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(&done[uint32_t(chunk) % kStages]);
  }
};

// kRows rows of a tile, as a tile.
template <class T, int kRows_>
struct TileRows {
  using E = typename T::E;
  static constexpr int kRows = kRows_, kCols = T::kCols;
  T tile;
  int first;
  __device__ uint32_t at(int row, int col) const { return tile.at(first + row, col); }
};

// Rows of a chunk: `rows` tokens from `token` on, columns [col, col + cols) of a head.
struct Place {
  int64_t batch, token, head;
  int rows, col, cols;
};

template <int kThreads, class T>
__device__ inline void load_rows(const T& to, const Input& x, const Place& at, bool vectors,
                                 int thread) {
  using E = typename T::E;
  const E* from = static_cast<const E*>(x.data) + offset(x, at.batch, at.token, at.head) + at.col;
  if (vectors)
    load_tile<true, kThreads>(to, from, x.t, at.rows, at.cols, thread);
  else
    load_tile<false, kThreads>(to, from, x.t, at.rows, at.cols, thread);
}

#if __CUDA_ARCH__ >= 900
// By one thread: 64 rows of all panels; what lies behind the tensor's ends becomes zero.
template <class T>
__device__ inline void load_rows_tma(const T& to, int first, const CUtensorMap& map,
                                     const Place& at, uint64_t* barrier) {
#pragma unroll
  for (int panel = 0; panel < T::kCols / 64; ++panel)
    tma_load(to.base + uint32_t(panel * T::kRows + first) * 128, &map, barrier, at.col + 64 * panel,
             int(at.head), int(at.token), int(at.batch));
}
#endif

// Rows from `rows` on to zero: TMA has put the next sequence's tokens there.
template <int kThreads, class T>
__device__ inline void clear_rows(const T& tile, int rows, int thread) {
  constexpr int kUnit = 16 / int(sizeof(typename T::E)), kUnits = T::kCols / kUnit;
  for (int i = rows * kUnits + thread; i < T::kRows * kUnits; i += kThreads)
    asm volatile(
        "st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(tile.at(i / kUnits, i % kUnits * kUnit)),
        "r"(0)
        : "memory");
}
}  // namespace df::cuda
