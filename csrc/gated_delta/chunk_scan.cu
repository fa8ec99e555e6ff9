// The states that enter the segments of a sequence, from what each segment makes of a state
// (chunk_segments.h): one step a segment,
//   S_in(j + 1) = M_j S_in(j) + H_j
// A CTA has one value head of one sequence and 16 or 32 columns of S (rows of S^T); it walks along
// the segments. A warp owns 32 rows and 16 columns: S from the last step is in its registers, and
// for the others in shared memory. M^T comes in stages of 32 rows by cp.async, several ahead and
// across steps, as operand A; H waits in registers from the start of its step. Products are 3xTF32,
// sums fp32: the hand-over keeps fp32 accuracy.
//   k of an mma: lane t of four has k = 4 t + 0..3 of 16, two products of it in turn; rows of two
//   mma: lane g of eight has rows 4 g + 0..3 of 32. So every access, shared or global, has 16
//   bytes, a warp's of M^T and of S^T whole lines of 128; XORs keep them apart (`unit`).
//   threads: K a group of 16 columns, at most 512; two CTAs an SM for K <= 128
//   registers: 128, of one group 184 (the loads of 16 k beside the products of others)
//   shared memory, K = 128, 32 columns: S^T twice 16 KB, 5 stages of 16 KB: 112 KB
//   a step, K = 128, 32 columns: 1.05 MFLOP (x 3) for 64 KB of M^T and 16 KB of H; 16 KB of states
//   written. Tiles of V re-read M^T: Vp / 32 times, Vp / 16 where that leaves SMs without a CTA,
//   but the first time from L2.
//   bound by tensor cores (mma.sync, 384 each a step) and almost as much by shared memory
#include "common/cuda/mma_sm80.cuh"
#include "gated_delta/chunk_device.cuh"
#include "gated_delta/chunk_segments.h"

namespace df {
namespace cuda {
template <int kK_, int kGroups_>
struct ScanConfig {
  static constexpr int kK = kK_, kGroups = kGroups_;  // of 16 columns
  static constexpr int kThreads = kK * kGroups, kCols = 16 * kGroups;
  static constexpr int kRows = 32, kBlocks = kK / kRows;  // of M^T a stage; stages a step
  static constexpr int kStageBytes = kRows * kK * 4, kStateBytes = kCols * kK * 4;
  static constexpr int kRoom = (kK <= 128 ? 112 : 160) * 1024;
  static constexpr int kFitting = (kRoom - 2 * kStateBytes) / kStageBytes;
  static constexpr int kStages = kFitting < 8 ? kFitting : 8;
  static constexpr int kShared = 2 * kStateBytes + kStages * kStageBytes;
};

// 16-byte units of a row of shared memory are permuted by a XOR. In rows of M^T, 4 t + r by lanes
// of units 8 n + g:
__device__ inline uint32_t transition_unit(int row, int unit) {
  return uint32_t(unit ^ (row / 4 % 4 * 2));
}
// In rows of S^T, g by lanes of units 4 n + t, and 2 t + i by lanes of units 8 n + g:
__device__ inline uint32_t state_unit(int row, int unit) {
  return uint32_t(unit ^ ((row ^ row / 4) % 2 * 4 + row / 2 % 2 * 2));
}

// split_tf32 in three instructions instead of eight, which bound this kernel: `high` by integers,
// so that only NaN and infinity are not rounded alike (they stay without a number in `low`). Tensor
// cores ignore 13 bits of an operand, which costs `low` 2^-23 of x.
__device__ inline void split_fast(float x, uint32_t& high, uint32_t& low) {
  high = (__float_as_uint(x) + 0x1000) & 0xffffe000;
  low = __float_as_uint(x - __uint_as_float(high));
}

template <class C>
struct Scan {
  static constexpr int kK = C::kK;

  const ChunkScan& p;
  uint32_t base;  // S^T of even and of odd steps, then the stages
  int64_t head, v0;
  int64_t second, next;  // slot of the second segment, from one to the next
  const float* from;     // the thread's part of the next stage to load, which goes to `filled`
  int left;              // stages to load
  uint32_t filled, read;
  float S[2][2][4];  // rows 4 g + 2 m, + 1; columns 8 n + 2 t, + 1

  __device__ static int g() { return threadIdx.x % 32 / 4; }
  __device__ static int t() { return threadIdx.x % 4; }
  // first of the warp's rows and columns
  __device__ static int row() { return threadIdx.x % kK / 32 * 32; }
  __device__ static int col() { return threadIdx.x / kK * 16; }

  // fn(n, i) for the lane's columns 8 n + 2 t + i
  template <class Fn>
  __device__ static void each_col(Fn fn) {
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) fn(n, i);
  }
  __device__ float4 rows_of(int n, int i) const {
    return {S[0][n][i], S[0][n][2 + i], S[1][n][i], S[1][n][2 + i]};
  }
  __device__ void add(int n, int i, float4 x) {
    S[0][n][i] += x.x, S[0][n][2 + i] += x.y, S[1][n][i] += x.z, S[1][n][2 + i] += x.w;
  }
  __device__ void clear() {
#pragma unroll
    for (auto& m : S) cuda::clear<16>(m);
  }

  __device__ float* states(int64_t slot) const {
    const int64_t v = v0 + col() + 2 * t();
    return p.segments.states + ((slot * p.in.shape.HV + head) * pad64(p.in.shape.V) + v) * kK +
           row() + 4 * g();
  }
  __device__ static float4* column(float* states, int n, int i) {
    return reinterpret_cast<float4*>(states + (8 * n + i) * kK);
  }
  __device__ void store(int64_t slot) const {
    float* const to = states(slot);
    each_col([&](int n, int i) { __stcg(column(to, n, i), rows_of(n, i)); });
  }
  __device__ void share(uint32_t state) const {
    each_col([&](int n, int i) {
      const int v = 8 * n + 2 * t() + i;
      const float4 x = rows_of(n, i);
      const uint32_t to = state + uint32_t(col() + v) * (kK * 4);
      asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(
                       to + 16 * state_unit(v, row() / 4 + g())),
                   "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
                   : "memory");
    });
  }

  __device__ uint32_t after(uint32_t stage) const {
    const uint32_t end = base + C::kShared;
    return stage + C::kStageBytes == end ? end - C::kStages * C::kStageBytes
                                         : stage + C::kStageBytes;
  }
  // The next stage of M^T; a group of copies even if there is none: the groups are counted.
  __device__ void request() {
    if (left > 0) {
      constexpr int kPass = C::kThreads / (kK / 4);
      const int row = threadIdx.x / (kK / 4), unit = threadIdx.x % (kK / 4);
#pragma unroll
      for (int r = 0; r < C::kRows; r += kPass)
        cp_async16(filled + uint32_t(r + row) * (kK * 4) + 16 * transition_unit(r + row, unit),
                   from + r * kK);
      from += C::kRows * kK, filled = after(filled), --left;
      if (left % C::kBlocks == 0) from += (next * p.in.shape.HV - 1) * (kK * kK);
    }
    cp_async_commit();
  }

  // S += rows k + 2 h and + 1 of M^T of four a lane, by columns of S^T likewise
  __device__ void multiply(const float4 (&M)[2], const float2 (&s)[2]) {
    uint32_t high[2][4], low[2][4];
    const float a[2][4] = {{M[0].x, M[0].y, M[1].x, M[1].y}, {M[0].z, M[0].w, M[1].z, M[1].w}};
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) split_fast(a[m][i], high[m][i], low[m][i]);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      uint32_t high0, high1, low0, low1;
      split_fast(s[n].x, high0, low0), split_fast(s[n].y, high1, low1);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float sum[4] = {};
        sm80::multiply_tf32(sum, low[m], high0, high1);
        sm80::multiply_tf32(sum, high[m], low0, low1);
        sm80::multiply_tf32(sum, high[m], high0, high1);
#pragma unroll
        for (int i = 0; i < 4; ++i) S[m][n][i] += sum[i];
      }
    }
  }
  __device__ void multiply(uint32_t transition, uint32_t state, int block) {
    const uint32_t M =
        transition + uint32_t(4 * t()) * (kK * 4) + 16 * transition_unit(4 * t(), row() / 4 + g());
    const uint32_t s = state + uint32_t(col() + g()) * (kK * 4) + uint32_t(block) * 128;
#pragma unroll(C::kGroups == 1 ? 2 : 1)  // one warp a scheduler, or two
    for (int k = 0; k < C::kRows; k += 16) {
      float4 m[4], x[2];
#pragma unroll
      for (int r = 0; r < 4; ++r) m[r] = load_shared4(M + uint32_t(k + r) * (kK * 4));
#pragma unroll
      for (int n = 0; n < 2; ++n)
        x[n] = load_shared4(s + n * 8 * (kK * 4) + 16 * state_unit(g(), k / 4 + t()));
      multiply({m[0], m[1]}, {{x[0].x, x[0].y}, {x[1].x, x[1].y}});
      multiply({m[2], m[3]}, {{x[0].z, x[0].w}, {x[1].z, x[1].w}});
    }
  }

  // S <- M S + H of the slot; S before it goes there
  __device__ void step(int j) {
    const int64_t slot = second + j * next;
    const uint32_t state = base + uint32_t(j % 2) * C::kStateBytes;
    float4 H[2][2];
    float* const at = states(slot);
    each_col([&](int n, int i) { H[n][i] = *column(at, n, i); });
    share(state), store(slot), clear();
#pragma unroll 1
    for (int b = 0; b < C::kBlocks; ++b) {
      cp_async_wait<C::kStages - 2>();
      __syncthreads();
      request();
      multiply(read, state, b);
      read = after(read);
    }
    each_col([&](int n, int i) { add(n, i, H[n][i]); });
  }

  // All segments but the last have an M; that of the first one is not needed.
  __device__ void run(int64_t first, int64_t count) {
    if (count < 2) return;
    next = p.backward ? -1 : 1;
    const int64_t start = p.backward ? first + count - 1 : first;
    second = start + next;
    from = p.segments.transitions + (second * p.in.shape.HV + head) * (kK * kK) + 4 * threadIdx.x;
    left = int(count - 2) * C::kBlocks, filled = read = base + 2 * C::kStateBytes;
#pragma unroll 1
    for (int stage = 0; stage < C::kStages - 1; ++stage) request();
    clear();
    each_col([&, from = states(start)](int n, int i) { add(n, i, *column(from, n, i)); });
#pragma unroll 1
    for (int j = 0; j < int(count - 2); ++j) step(j);
    store(start + (count - 1) * next);
  }
};

template <class C>
__global__ __launch_bounds__(C::kThreads, C::kK <= 128 ? 2 : 1) void chunk_scan_kernel(
    const __grid_constant__ ChunkScan p) {
  extern __shared__ __align__(1024) char raw[];
  const ChunkShape& shape = p.in.shape;
  const uint32_t tiles = pad64(shape.V) / C::kCols, row = blockIdx.x / tiles, HV = shape.HV;
  const int64_t tokens = shape.C * p.segments.chunks;
  const Span s = sequence_span(p.in, row / HV, tokens);
  Scan<C> scan{p, shared_address(raw), row % HV, blockIdx.x % tiles * C::kCols};
  scan.run(s.slot, (s.end - s.begin + tokens - 1) / tokens);
}

template <class C>
void chunk_scan_launch(const ChunkScan& p, void* stream) {
  const int64_t blocks = pad64(p.in.shape.V) / C::kCols * p.in.shape.HV * p.in.N;
  cudaFuncSetAttribute(chunk_scan_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       C::kShared);
  chunk_scan_kernel<C>
      <<<unsigned(blocks), C::kThreads, C::kShared, static_cast<cudaStream_t>(stream)>>>(p);
}

// 32 columns a CTA if five SMs of six get one.
template <int kK>
void chunk_scan_cols(const ChunkScan& p, void* stream) {
  int device = 0, sms = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (6 * (pad64(p.in.shape.V) / 32 * p.in.shape.HV * p.in.N) >= 5 * sms)
    return chunk_scan_launch<ScanConfig<kK, 2>>(p, stream);
  chunk_scan_launch<ScanConfig<kK, 1>>(p, stream);
}
}  // namespace cuda

void chunk_scan_cuda(const ChunkScan& p, void* stream) {
  switch (pad64(p.in.shape.K)) {
    case 64: return cuda::chunk_scan_cols<64>(p, stream);
    case 128: return cuda::chunk_scan_cols<128>(p, stream);
    case 192: return cuda::chunk_scan_cols<192>(p, stream);
    default: return cuda::chunk_scan_cols<256>(p, stream);
  }
}
}  // namespace df
