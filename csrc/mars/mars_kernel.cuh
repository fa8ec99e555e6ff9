// MARS on lists of tensors; equations in mars.h. Arithmetic in T, squares and scalars in double.
//
// One persistent launch of 7 + 1 warps a CTA. An item is a chunk of 14336 elements of one tensor:
//   N  partial sum of (a g - b h)^2; the tensor's last N adds the partial sums, in their order
//   C  counts elements with d g > 0 (caution by the mean), needs the tensor's norm
//   U  the update, needs the norm and the count
// in the order N(T0), N(T1) C(T0), N(T2) C(T1) U(T0), ... (without C: U one place earlier), so that
// U finds g and h of its tensor in the L2 cache, the chunk read last first. CTAs draw items by an
// atomic ticket; an item waits only for items with smaller tickets, which others have drawn and
// finish without it: no deadlock, whatever the number of resident CTAs. The last CTA to find no
// item increments the steps. Sums do not depend on who added them: equal bits in every launch.
// The eighth warp draws the CTA's next item, computes its constants and waits for it, while the
// others work; these never wait themselves, so that the smallest unfinished ticket always proceeds.
//
// A warp takes quanta of 256 elements, 8 a lane (mars_memory.cuh): also the block of 8-bit states.
// Workspace: ticket and count of finished CTAs, MarsProgress of each tensor (both zeroed on the
// stream before the launch, so that a graph can replay it), 8 bytes a partial sum. The table
// travels as an argument of up to 32000 bytes, some 170 tensors; a larger one is put into the
// workspace by one launch more for every 32000 bytes. Lists with float64 parameters and others: a
// launch each. Shared memory: two items and the values of the 8-bit codes, 3 KB. Registers (float,
// double): update 122, 168; norms alone 56, 64; no spills. Beside float two CTAs an SM, each
// thread with 160 bytes of float32 arrays in flight.
//
// U's accesses are the last ones to their bytes and leave L2 first, which keeps what N has read of
// the next tensor. Bytes an element, mars-adamw: float32 N 8, U 20 read + 16 written; bfloat16 p,
// g, h with split16 N 4, U 16 read + 14 written; 8-bit m, v, h with bfloat16 p, g: N 3, U 7 + 5.
// Bound by memory, except for the 8-bit states, whose encoding is some 40 instructions an element
// and array. float32 takes 48 an element, without a branch on what an array is.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "mars/mars_item.cuh"

namespace df::cuda {
// ---- N
__device__ inline void mars_workers_sync() {  // the warps that do not look for the next item
  asm volatile("bar.sync 1, %0;" ::"n"(kMarsThreads) : "memory");
}
// Sum over the CTA, for thread 0.
template <class T>
__device__ inline double mars_cta_sum(double x, MarsItem<T>& s) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  mars_workers_sync();  // the sums of before were read
  if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = x;
  mars_workers_sync();
  double sum = 0;
  for (int i = 0; i < kMarsWarps; ++i) sum += s.sums[i];
  return sum;
}

// Whole quanta of float arrays; of two of them g and h are in flight.
__device__ inline double mars_plain_square(const MarsItem<float>& s, int64_t begin, int64_t end) {
  const float a = s.y.norm_a, b = s.y.b;
  double sum = 0;
#pragma unroll 2
  for (int64_t q = begin + threadIdx.x / 32; q < end; q += kMarsWarps) {
    float g[kMarsLane], h[kMarsLane];
    mars_load_floats<false>(s.entry.tensor.g, q, g);
    mars_load_floats<false>(s.entry.tensor.h.data, q, h);
#pragma unroll
    for (int k = 0; k < kMarsLane; ++k) {
      const double c = a * g[k] - b * h[k];
      sum += c * c;
    }
  }
  return sum;
}

template <class T>
__device__ inline double mars_chunk_square(const MarsItem<T>& s) {
  const MarsTensor& t = s.entry.tensor;
  const T a = s.y.norm_a, b = s.y.b;
  double sum = 0;
  if constexpr (sizeof(T) == 4) {
    constexpr int64_t kQuanta = kMarsCudaChunk / kMarsQuantum;
    const int64_t begin = s.chunk * kQuanta;
    if (s.entry.access == MarsAccess::plain && (begin + kQuanta) * kMarsQuantum <= t.n)
      return mars_plain_square(s, begin, begin + kQuanta);
  }
  mars_quanta(s, [&](const MarsPlace& at, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    const Raw<T> g_raw = mars_fetch<T, kWhole>(mars_gradient(t), at);
    const Raw<T> h_raw = mars_fetch<T, kWhole>(t.h, at);
    T g[kMarsLane], h[kMarsLane];
    mars_unpack(g_raw, mars_gradient(t), s.codes[1], g);
    mars_unpack(h_raw, t.h, s.codes[1], h);
#pragma unroll
    for (int k = 0; k < kMarsLane; ++k) {
      const double c = a * g[k] - b * h[k];
      sum += c * c;
    }
  });
  return sum;
}

// Whether all of the tensor's partial sums are there: then *total is their sum, for thread 0.
template <class T>
__device__ inline bool mars_norm(const MarsLaunch& p, MarsItem<T>& s, double* total) {
  const double sum = mars_cta_sum(mars_chunk_square(s), s);
  double* parts = mars_parts(p) + s.entry.part;
  if (threadIdx.x == 0) {
    __stcg(parts + s.chunk, sum);
    s.last = mars_arrive(&s.progress->arrived) + 1 == s.entry.chunks;
  }
  mars_workers_sync();
  if (!s.last) return false;
  __threadfence();
  double x = 0;
  for (int i = threadIdx.x; i < s.entry.chunks; i += kMarsThreads) x += __ldcg(parts + i);
  *total = mars_cta_sum(x, s);
  return true;
}

// ---- the direction
// Of one element: g in its sign and scale, c, the new m, and d, which is returned.
template <class T>
struct MarsMomentum {
  T g, c, m;
};
template <class T>
__device__ inline T mars_direction(const MarsItem<T>& s, T raw, T h, T m, MarsMomentum<T>& x) {
  const MarsConstants<T>& y = s.y;
  x.g = x.c = raw * y.g_scale;
  if (s.section.corrected) x.c = (y.a * x.g - y.b * h) * y.clip;
  if (s.section.stateless) x.c = y.a * x.g;
  x.m = y.beta1 * m + y.rest1 * x.c;
  return s.section.stateless ? x.m + y.extra * x.g : x.m;
}

// ---- C
template <class T>
__device__ inline void mars_count(MarsItem<T>& s) {
  const MarsTensor& t = s.entry.tensor;
  uint32_t count = 0;
  mars_quanta(s, [&](const MarsPlace& at, auto whole) {
    constexpr bool kWhole = decltype(whole)::value;
    const Raw<T> g_raw = mars_fetch<T, kWhole>(mars_gradient(t), at);
    const Raw<T> h_raw = mars_fetch<T, kWhole>(t.h, at), m_raw = mars_fetch<T, kWhole>(t.m, at);
    T g[kMarsLane], h[kMarsLane], m[kMarsLane];
    mars_unpack(g_raw, mars_gradient(t), s.codes[1], g);
    mars_unpack(h_raw, t.h, s.codes[1], h);
    mars_unpack(m_raw, t.m, s.codes[1], m);
#pragma unroll
    for (int k = 0; k < kMarsLane; ++k) {  // behind the end g = 0, which agrees with nothing
      MarsMomentum<T> x;
      const T d = mars_direction(s, g[k], h[k], m[k], x);
      count += d * x.g > 0;
    }
  });
  count = __reduce_add_sync(0xffffffffu, count);
  if (threadIdx.x % 32 == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(&s.progress->agreeing), count);
  mars_workers_sync();
  if (threadIdx.x == 0) mars_arrive(&s.progress->counted);
}

// ---- U
template <class T>
struct MarsRaw {  // all arrays of a quantum
  Raw<T> g, h, m, v, vmax, p, master;
};

template <class T>
__device__ inline MarsArray mars_master(const MarsItem<T>& s) {
  const bool split = s.section.master == MarsMaster::split16;
  return {s.entry.tensor.master, split ? DType::bf16 : DType::f32};
}

// Read for the last time, as all that is written here: L2 keeps the g and h that N has read.
template <class T, bool kWhole>
__device__ inline MarsRaw<T> mars_fetch_all(const MarsItem<T>& s, const MarsPlace& at) {
  const MarsTensor& t = s.entry.tensor;
  const bool reads_p = s.section.rule != MarsRule::momentum && s.section.master != MarsMaster::fp32;
  MarsRaw<T> raw;
  raw.g = mars_fetch<T, kWhole, true>(mars_gradient(t), at);
  raw.h = mars_fetch<T, kWhole, true>(t.h, at);
  raw.m = mars_fetch<T, kWhole, true>(t.m, at);
  raw.v = mars_fetch<T, kWhole, true>(t.v, at);
  raw.vmax = mars_fetch<T, kWhole, true>(t.vmax, at);
  raw.p = mars_fetch<T, kWhole, true>(reads_p ? t.p : MarsArray{}, at);
  raw.master = mars_fetch<T, kWhole, true>(mars_master(s), at);
  return raw;
}

// Stores v rounded at random where it is bfloat16.
template <class T, bool kWhole>
__device__ inline void mars_store_square(const MarsLaunch& p, const MarsItem<T>& s,
                                         const T (&v)[kMarsLane], const MarsPlace& at) {
  const MarsTensor& t = s.entry.tensor;
  if constexpr (sizeof(T) == 4)
    if (t.v.type == DType::bf16) {
      const MarsBits bits =
          mars_lane_bits(p.seed, at.quantum, s.step, t.number, MarsStream::second_moment);
      return mars_store_halves<kWhole>(
          [&](int k) { return mars_round_stochastic(__float_as_uint(v[k]), mars_half(bits, k)); },
          t.v.data, at);
    }
  mars_store<T, kWhole, false, true>(v, t.v, at);
}

// c becomes the second moment, u the direction divided by its root.
template <class T, bool kWhole>
__device__ inline void mars_adam(const MarsLaunch& p, const MarsItem<T>& s, const MarsRaw<T>& raw,
                                 T (&c)[kMarsLane], T (&u)[kMarsLane], const MarsPlace& at) {
  const MarsTensor& t = s.entry.tensor;
  T before[kMarsLane];
  mars_unpack(raw.v, t.v, s.codes[0], before);
#pragma unroll
  for (int k = 0; k < kMarsLane; ++k) c[k] = s.y.beta2 * before[k] + s.y.rest2 * (c[k] * c[k]);
  mars_store_square<T, kWhole>(p, s, c, at);
  if (t.vmax.data) {
    mars_unpack(raw.vmax, t.vmax, s.codes[0], before);
#pragma unroll
    for (int k = 0; k < kMarsLane; ++k) c[k] = before[k] > c[k] ? before[k] : c[k];  // keeps NaN
    mars_store<T, kWhole, false, true>(c, t.vmax, at);
  }
#pragma unroll
  for (int k = 0; k < kMarsLane; ++k) u[k] = u[k] / (sqrt(c[k]) * s.y.rsqrt_bias2 + s.y.eps);
}

template <class T>
__device__ inline void mars_open_parameter(const MarsItem<T>& s, const MarsRaw<T>& raw,
                                           T (&x)[kMarsLane]) {
  if constexpr (sizeof(T) == 4)
    if (s.section.master == MarsMaster::split16) {
#pragma unroll
      for (int k = 0; k < kMarsLane; ++k)
        x[k] = __uint_as_float(mars_join(mars_halfword(raw.p, k), mars_halfword(raw.master, k)));
      return;
    }
  if (s.section.master == MarsMaster::fp32)
    mars_unpack(raw.master, mars_master(s), nullptr, x);
  else
    mars_unpack(raw.p, s.entry.tensor.p, nullptr, x);
}

template <class T, bool kWhole>
__device__ inline void mars_close_parameter(const MarsLaunch& p, const MarsItem<T>& s,
                                            const T (&x)[kMarsLane], const MarsPlace& at) {
  const MarsTensor& t = s.entry.tensor;
  if constexpr (sizeof(T) == 4) {
    if (s.section.master == MarsMaster::split16) {
      const auto bits = [&](int k) { return __float_as_uint(x[k]); };
      mars_store_halves<kWhole>([&](int k) { return mars_split_high(bits(k)); }, t.p.data, at);
      return mars_store_halves<kWhole>([&](int k) { return mars_split_low(bits(k)); }, t.master,
                                       at);
    }
    if (s.section.stochastic && s.section.master == MarsMaster::none) {
      const MarsBits bits =
          mars_lane_bits(p.seed, at.quantum, s.step, t.number, MarsStream::parameter);
      return mars_store_halves<kWhole>(
          [&](int k) { return mars_round_stochastic(__float_as_uint(x[k]), mars_half(bits, k)); },
          t.p.data, at);
    }
  }
  if (s.section.master == MarsMaster::fp32)
    mars_store<T, kWhole, true, true>(x, mars_master(s), at);
  mars_store<T, kWhole, true, true>(x, t.p, at);
}

// u: the direction; agreeing: bit k where d g > 0. u becomes what is subtracted from p.
template <class T>
__device__ inline void mars_sign_and_caution(const MarsItem<T>& s, uint32_t agreeing,
                                             T (&u)[kMarsLane]) {
  if (s.section.rule == MarsRule::lion)
#pragma unroll
    for (int k = 0; k < kMarsLane; ++k) u[k] = u[k] > 0 ? T(1) : u[k] < 0 ? T(-1) : u[k];
  if (s.section.caution != MarsCaution::off && s.section.rule != MarsRule::given)
#pragma unroll
    for (int k = 0; k < kMarsLane; ++k) u[k] = agreeing >> k & 1 ? u[k] * s.y.caution_scale : T(0);
}

template <class T, bool kWhole>
__device__ inline void mars_update_quantum(const MarsLaunch& p, const MarsItem<T>& s,
                                           const MarsPlace& at) {
  const MarsTensor& t = s.entry.tensor;
  const MarsRaw<T> raw = mars_fetch_all<T, kWhole>(s, at);
  T g[kMarsLane], c[kMarsLane], u[kMarsLane];
  uint32_t agreeing = 0;
  mars_unpack(raw.g, mars_gradient(t), s.codes[1], g);
  if (s.section.rule == MarsRule::given) {
#pragma unroll
    for (int k = 0; k < kMarsLane; ++k) u[k] = g[k] * s.y.g_scale;
  } else {
    mars_unpack(raw.h, t.h, s.codes[1], c);
    mars_unpack(raw.m, t.m, s.codes[1], u);
#pragma unroll
    for (int k = 0; k < kMarsLane; ++k) {
      MarsMomentum<T> x;
      const T d = mars_direction(s, g[k], c[k], u[k], x);
      agreeing |= uint32_t(d * x.g > 0) << k;
      g[k] = x.g, c[k] = x.c, u[k] = x.m;
    }
    if (t.h.data && s.section.write_h) mars_store<T, kWhole, true, true>(g, t.h, at);
    mars_store<T, kWhole, true, true>(u, t.m, at);
    if (s.section.stateless)
#pragma unroll
      for (int k = 0; k < kMarsLane; ++k) u[k] += s.y.extra * g[k];
    if (s.section.rule == MarsRule::adamw) mars_adam<T, kWhole>(p, s, raw, c, u, at);
  }
  mars_sign_and_caution(s, agreeing, u);
  if (s.section.rule == MarsRule::momentum) return mars_close_parameter<T, kWhole>(p, s, u, at);
  T x[kMarsLane];
  mars_open_parameter(s, raw, x);
#pragma unroll
  for (int k = 0; k < kMarsLane; ++k) x[k] = x[k] - (s.y.decay * x[k] + s.y.step_size * u[k]);
  mars_close_parameter<T, kWhole>(p, s, x, at);
}

// The same where all arrays are floats: without a branch.
template <bool kCorrected, class T>
__device__ inline void mars_update_plain(const MarsItem<T>& s, const MarsPlace& at) {
  const MarsTensor& t = s.entry.tensor;
  const MarsConstants<T>& y = s.y;
  float g[kMarsLane], h[kMarsLane], m[kMarsLane], v[kMarsLane], x[kMarsLane];
  mars_load_floats<true>(t.g, at.quantum, g);
  if constexpr (kCorrected) mars_load_floats<true>(t.h.data, at.quantum, h);
  mars_load_floats<true>(t.m.data, at.quantum, m);
  mars_load_floats<true>(t.v.data, at.quantum, v);
  mars_load_floats<true>(t.p.data, at.quantum, x);
#pragma unroll
  for (int k = 0; k < kMarsLane; ++k) {
    g[k] *= y.g_scale;
    const float c = kCorrected ? (y.a * g[k] - y.b * h[k]) * y.clip : g[k];
    m[k] = y.beta1 * m[k] + y.rest1 * c;
    v[k] = y.beta2 * v[k] + y.rest2 * (c * c);
    const float u = m[k] / (sqrt(v[k]) * y.rsqrt_bias2 + y.eps);
    x[k] = x[k] - (y.decay * x[k] + y.step_size * u);
  }
  if constexpr (kCorrected) mars_store_floats(g, t.h.data, at.quantum);
  mars_store_floats(m, t.m.data, at.quantum);
  mars_store_floats(v, t.v.data, at.quantum);
  mars_store_floats(x, t.p.data, at.quantum);
}
template <class T>
__device__ inline void mars_update(const MarsLaunch& p, const MarsItem<T>& s) {
  mars_quanta(s, [&](const MarsPlace& at, auto whole) {
    if constexpr (sizeof(T) == 4 && decltype(whole)::value)
      if (s.entry.access == MarsAccess::plain)
        return s.section.corrected ? mars_update_plain<true>(s, at)
                                   : mars_update_plain<false>(s, at);
    mars_update_quantum<T, decltype(whole)::value>(p, s, at);
  });
}

// ---- kernels
template <class T>
__device__ inline void mars_fill_codes(MarsItem<T>& s) {
  for (uint32_t code = threadIdx.x; code < 256; code += blockDim.x)
    s.codes[0][code] = mars_decode<false>(code), s.codes[1][code] = mars_decode<true>(code);
}

// Once all items are done: by the last CTA.
template <class T>
__device__ inline void mars_advance(const MarsParameters& p, MarsItem<T>& s) {
  if (threadIdx.x == 0) s.last = mars_arrive(&mars_counters(p.launch)->done) + 1 == gridDim.x;
  __syncthreads();
  if (!s.last) return;
  mars_with_entries(p, [&](const MarsEntry* entries) {
    for (int i = threadIdx.x; i < p.launch.tensors; i += blockDim.x)
      if (float* step = entries[i].step; entries[i].counts_steps)
        *step = *step + 1 < float(kMarsMaxStep) ? *step + 1 : float(kMarsMaxStep);
  });
}

// Draws the next item and waits for what it depends on; one thread.
template <class T>
__device__ inline void mars_next(const MarsParameters& p, MarsWork<T>& next) {
  const uint32_t item = atomicAdd(&mars_counters(p.launch)->ticket, 1);
  next.phase = MarsPhase::none;
  if (item >= p.launch.items) return;
  mars_load(p, item, next);
  if (next.phase != MarsPhase::norm) mars_await(p.launch, next);
}

template <class T>
__global__ void __launch_bounds__(kMarsThreads + 32, sizeof(T) == 4 ? 2 : 1)
    mars_kernel(const __grid_constant__ MarsParameters p) {
  constexpr int kWords = sizeof(MarsWork<T>) / 4;
  static_assert(sizeof(MarsWork<T>) % 4 == 0);
  __shared__ alignas(16) unsigned char storage[sizeof(MarsItem<T>)];
  __shared__ alignas(16) uint32_t coming[kWords];
  MarsItem<T>& s = *reinterpret_cast<MarsItem<T>*>(storage);
  MarsWork<T>& next = *reinterpret_cast<MarsWork<T>*>(coming);
  const bool scout = threadIdx.x >= kMarsThreads;
  if (mars_number(p.launch.found_inf, 0) != 0) return;
  mars_fill_codes(s);
  if (scout) {
    for (int i = threadIdx.x - kMarsThreads; i < kWords; i += 32) coming[i] = 0;  // padding, too
    __syncwarp();
    if (threadIdx.x == kMarsThreads) mars_next(p, next);
  }
  while (true) {
    __syncthreads();  // this item is done, the next one is known
    for (int i = threadIdx.x; i < kWords; i += kMarsThreads + 32)
      reinterpret_cast<uint32_t*>(storage)[i] = coming[i];
    __syncthreads();
    if (s.phase == MarsPhase::none) break;
    double square;
    if (scout) {
      if (threadIdx.x == kMarsThreads) mars_next(p, next);
      __syncwarp();
    } else if (s.phase == MarsPhase::update) {
      mars_update(p.launch, s);
    } else if (s.phase == MarsPhase::count) {
      mars_count(s);
    } else if (mars_norm(p.launch, s, &square) && threadIdx.x == 0) {
      s.progress->square = square;
      mars_arrive(&s.progress->arrived);
    }
  }
  mars_advance(p, s);
}

template <class T>
__global__ void __launch_bounds__(kMarsThreads, 2)
    mars_squares_kernel(const __grid_constant__ MarsParameters p) {
  __shared__ alignas(16) unsigned char storage[sizeof(MarsItem<T>)];
  MarsItem<T>& s = *reinterpret_cast<MarsItem<T>*>(storage);
  mars_fill_codes(s);
  if (blockIdx.x == 0)
    mars_with_entries(p, [&](const MarsEntry* entries) {  // empty tensors have no items
      for (int i = threadIdx.x; i < p.launch.tensors; i += kMarsThreads)
        if (entries[i].chunks == 0) p.launch.squares[entries[i].tensor.number] = 0;
    });
  for (int item = blockIdx.x; item < p.launch.items; item += gridDim.x) {
    __syncthreads();  // the item of before is done
    if (threadIdx.x == 0) mars_load(p, item, s);
    __syncthreads();
    double square;
    if (mars_norm(p.launch, s, &square) && threadIdx.x == 0)
      p.launch.squares[s.entry.tensor.number] = square;
  }
}

// A part of the table, from the arguments to the workspace.
struct MarsUpload {
  uint4* to;
  int words;
  alignas(16) uint4 from[kMarsTableBytes / 16];
};
static __global__ void mars_upload_kernel(const __grid_constant__ MarsUpload p) {
  for (int i = threadIdx.x; i < p.words; i += blockDim.x) p.to[i] = p.from[i];
}

// ---- launches
inline void mars_upload(const void* table, int64_t bytes, char* to, cudaStream_t stream) {
  for (int64_t at = 0; at < bytes; at += kMarsTableBytes) {
    const int64_t size = bytes - at < kMarsTableBytes ? bytes - at : kMarsTableBytes;
    MarsUpload part;
    part.to = reinterpret_cast<uint4*>(to + at);
    part.words = int((size + 15) / 16);
    std::memcpy(part.from, static_cast<const char*>(table) + at, size);
    mars_upload_kernel<<<1, kMarsThreads, 0, stream>>>(part);
  }
}

// As many CTAs as are resident at once, or items.
template <class Kernel>
int mars_grid(Kernel kernel, int threads, int items) {
  int device = 0, sms = 0, resident = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0);
  return std::clamp(items, 1, std::max(1, sms * resident));
}

template <class T>
void mars_launch(const MarsLaunch& x, const void* table, void* on) {
  const cudaStream_t stream = static_cast<cudaStream_t>(on);
  MarsParameters p;
  p.launch = x;
  p.in_workspace = mars_table_bytes(x) > kMarsTableBytes;
  cudaMemsetAsync(x.workspace, 0, mars_zeroed_bytes(x), stream);
  if (p.in_workspace)
    mars_upload(table, mars_table_bytes(x), static_cast<char*>(x.workspace) + mars_table_offset(x),
                stream);
  else
    std::memcpy(p.table, table, mars_table_bytes(x));
  const auto kernel = x.squares ? mars_squares_kernel<T> : mars_kernel<T>;
  const int threads = x.squares ? kMarsThreads : kMarsThreads + 32;
  kernel<<<mars_grid(kernel, threads, x.items), threads, 0, stream>>>(p);
}
}  // namespace df::cuda
