// MARS on lists of tensors; equations in mars.h. Arithmetic in T, squares and scalars in double.
//
// One persistent launch of 256 threads a CTA. An item is a chunk of 32768 elements of one tensor:
//   N  partial sum of (a g - b h)^2; the tensor's last N adds the partial sums, in their order
//   C  counts elements with d g > 0 (caution by the mean), needs the tensor's norm
//   U  the update, needs the norm and the count
// in the order N(T0), N(T1) C(T0), N(T2) C(T1) U(T0), ... (without C: U one place earlier), so that
// U finds g and h of its tensor in the L2 cache, the chunk read last first. CTAs draw items by an
// atomic ticket; an item waits only for items with smaller tickets, which others have drawn and
// finish without it: no deadlock, whatever the number of resident CTAs. The last CTA to find no
// item increments the steps. Sums do not depend on who added them: equal bits in every launch.
//
// A warp takes quanta of 256 elements, 8 a lane (mars_memory.cuh): also the block of 8-bit states.
// Workspace: ticket and count of finished CTAs, MarsProgress of each tensor (both zeroed on the
// stream before the launch, so that a graph can replay it), 8 bytes a partial sum. The table
// travels as an argument of up to 32000 bytes, some 170 tensors; a larger one is put into the
// workspace by one launch more for every 32000 bytes. Lists with float64 parameters and others: a
// launch each. Shared memory: the item and the values of the 8-bit codes, 2.5 KB. Registers (float,
// double): update 112, 168; norms alone 53, 64; no spills. Beside float two CTAs an SM, each thread
// with 160 bytes of float32 arrays in flight.
//
// Bytes an element, mars-adamw: float32 N 8, U 20 read + 16 written; bfloat16 p, g, h with split16
// N 4, U 16 read + 14 written; 8-bit m, v, h with bfloat16 p, g: N 3, U 7 + 5. Bound by memory,
// except for the 8-bit states, whose encoding is some 40 instructions an element and array.
#pragma once
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "mars/mars_launch.h"
#include "mars/mars_memory.cuh"

namespace df::cuda {
constexpr int kMarsThreads = 256, kMarsWarps = kMarsThreads / 32;

struct MarsParameters {
  MarsLaunch launch;
  bool in_workspace;  // the table
  alignas(16) unsigned char table[kMarsTableBytes];
};
static_assert(sizeof(MarsParameters) <= 32764);

enum class MarsPhase : int32_t { norm, count, update, none };

template <class T>
struct MarsConstants {  // MarsScalars in the compute type
  T g_scale, a, b, norm_a, clip, beta1, rest1, extra, beta2, rest2, eps, decay, step_size;
  T rsqrt_bias2, caution_scale;
};

// What a CTA works on, and its exchange; in shared memory.
template <class T>
struct MarsItem {
  MarsPhase phase;
  int32_t chunk;
  uint32_t step;
  bool last;  // this CTA was the last one to arrive
  MarsProgress* progress;
  MarsEntry entry;
  MarsSection section;
  MarsConstants<T> y;
  double sums[kMarsWarps];
  float codes[2][256];  // what unsigned and signed codes stand for
};

// ---- the table, the workspace, numbers on the device
// fn(entries): in two copies, since loads of arguments are other instructions than those of memory.
template <class Fn>
__device__ inline void mars_with_entries(const MarsParameters& p, Fn fn) {
  const char* workspace = static_cast<const char*>(p.launch.workspace);
  if (p.in_workspace)
    fn(reinterpret_cast<const MarsEntry*>(workspace + mars_table_offset(p.launch)));
  else
    fn(reinterpret_cast<const MarsEntry*>(p.table));
}
__device__ inline MarsCounters* mars_counters(const MarsLaunch& x) {
  return static_cast<MarsCounters*>(x.workspace);
}
__device__ inline MarsProgress* mars_progress(const MarsLaunch& x) {
  return reinterpret_cast<MarsProgress*>(static_cast<char*>(x.workspace) + kMarsCountersBytes);
}
__device__ inline double* mars_parts(const MarsLaunch& x) {
  return reinterpret_cast<double*>(static_cast<char*>(x.workspace) + mars_zeroed_bytes(x));
}
__device__ inline double mars_number(const MarsInput& x, double otherwise) {
  if (x.data == nullptr) return otherwise;
  return x.type == DType::f64 ? *static_cast<const double*>(x.data)
                              : *static_cast<const float*>(x.data);
}

// ---- synchronisation between CTAs, by one thread of each
__device__ inline uint32_t mars_acquire(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}
__device__ inline uint32_t mars_arrive(uint32_t* p) {  // how many came before
  __threadfence();
  return atomicAdd(p, 1);
}
__device__ inline void mars_wait(const uint32_t* p, uint32_t arrivals) {
  while (mars_acquire(p) < arrivals) __nanosleep(100);
}

template <class T>
__device__ inline void mars_constants(const MarsLaunch& p, MarsItem<T>& s) {
  const MarsSection& x = s.section;
  const double* scheduled = p.schedule ? p.schedule + 3 * s.entry.tensor.section : nullptr;
  double step = s.entry.step ? *s.entry.step : 0;
  if (s.entry.counts_steps) step = step + 1 < kMarsMaxStep ? step + 1 : kMarsMaxStep;
  const MarsScalars y =
      mars_scalars(x, scheduled ? scheduled[0] : x.lr, scheduled ? scheduled[1] : x.weight_decay,
                   scheduled ? scheduled[2] : x.gamma, step, mars_number(p.grad_scale, 1));
  s.step = uint32_t(step);
  s.y = {T(y.g_scale), T(y.a),     T(y.b),         T(y.a * y.g_scale), T(1),
         T(y.beta1),   T(y.rest1), T(y.extra),     T(y.beta2),         T(1 - y.beta2),
         T(y.eps),     T(y.decay), T(y.step_size), T(y.rsqrt_bias2),   T(1)};
}

// What depends on the elements of the whole tensor, once other CTAs have it.
template <class T>
__device__ inline void mars_await(const MarsLaunch& p, MarsItem<T>& s) {
  const MarsTensor& t = s.entry.tensor;
  if (s.entry.norm) {
    mars_wait(&s.progress->arrived, s.entry.chunks + 1);
    s.y.clip = T(mars_clip(sqrt(__ldcg(&s.progress->square)), s.section.clip));
  } else if (p.norms && s.section.corrected && isfinite(s.section.clip)) {
    s.y.clip = T(mars_clip(p.norms[t.number], s.section.clip));
  }
  if (s.phase == MarsPhase::update && s.entry.count) {
    mars_wait(&s.progress->counted, s.entry.chunks);
    const uint64_t agreeing = __ldcg(reinterpret_cast<unsigned long long*>(&s.progress->agreeing));
    const double mean = double(agreeing) / double(t.n);
    s.y.caution_scale = T(1 / (mean > kMarsMinAgreement ? mean : kMarsMinAgreement));
  }
}

// The phase, tensor and chunk of an item.
template <class T>
__device__ inline int mars_find(const MarsLaunch& x, const MarsEntry* entries, int item,
                                MarsItem<T>& s) {
  int group = 0;
  for (int end = x.tensors + x.lag; end - group > 1;) {
    const int middle = (group + end) / 2;
    (entries[middle].first <= item ? group : end) = middle;
  }
  int rest = item - entries[group].first;
  const auto take = [&](MarsPhase phase, int tensor, int items) {
    s.phase = phase, s.chunk = rest;
    rest -= items;
    return rest < 0 ? tensor : -1;
  };
  const auto items = [&](int tensor, bool MarsEntry::* has) {
    const bool exists = tensor >= 0 && tensor < x.tensors && entries[tensor].*has;
    return exists ? entries[tensor].chunks : 0;
  };
  int tensor = take(MarsPhase::norm, group, items(group, &MarsEntry::norm));
  if (tensor >= 0) return tensor;
  tensor = take(MarsPhase::count, group - 1, items(group - 1, &MarsEntry::count));
  if (tensor >= 0) return tensor;
  s.phase = MarsPhase::update;
  s.chunk = entries[group - x.lag].chunks - 1 - rest;  // what was read last comes first
  return group - x.lag;
}

template <class T>
__device__ inline void mars_load(const MarsParameters& p, int item, MarsItem<T>& s) {
  const MarsLaunch& x = p.launch;
  mars_with_entries(p, [&](const MarsEntry* entries) {
    const int tensor = mars_find(x, entries, item, s);
    const MarsEntry* sections = entries + x.tensors + x.lag;
    s.progress = mars_progress(x) + tensor;
    s.entry = entries[tensor];
    s.section = reinterpret_cast<const MarsSection*>(sections)[s.entry.tensor.section];
  });
  mars_constants(x, s);
}

// Calls fn(place, whole) for the warp's quanta of the chunk; whole: vectors may be used.
template <class T, class Fn>
__device__ inline void mars_quanta(const MarsItem<T>& s, Fn fn) {
  constexpr int64_t kQuanta = kMarsChunk / kMarsQuantum;
  const int64_t n = s.entry.tensor.n, begin = s.chunk * kQuanta;
  const int64_t all = (n + kMarsQuantum - 1) / kMarsQuantum;
  const int64_t end = begin + kQuanta < all ? begin + kQuanta : all;
  for (int64_t q = begin + threadIdx.x / 32; q < end; q += kMarsWarps) {
    if (s.entry.vectors && (q + 1) * kMarsQuantum <= n)
      fn(MarsPlace{q, n}, std::true_type{});
    else
      fn(MarsPlace{q, n}, std::false_type{});
  }
}

__device__ inline MarsArray mars_gradient(const MarsTensor& t) {
  return {const_cast<void*>(t.g), t.g_type};
}

// ---- N
// Sum over the CTA, for thread 0.
template <class T>
__device__ inline double mars_cta_sum(double x, MarsItem<T>& s) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
  __syncthreads();  // the sums of before were read
  if (threadIdx.x % 32 == 0) s.sums[threadIdx.x / 32] = x;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kMarsWarps; ++i) sum += s.sums[i];
  return sum;
}

template <class T>
__device__ inline double mars_chunk_square(const MarsItem<T>& s) {
  const MarsTensor& t = s.entry.tensor;
  const T a = s.y.norm_a, b = s.y.b;
  double sum = 0;
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
  __syncthreads();
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
  __syncthreads();
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

template <class T, bool kWhole>
__device__ inline MarsRaw<T> mars_fetch_all(const MarsItem<T>& s, const MarsPlace& at) {
  const MarsTensor& t = s.entry.tensor;
  const bool reads_p = s.section.rule != MarsRule::momentum && s.section.master != MarsMaster::fp32;
  MarsRaw<T> raw;
  raw.g = mars_fetch<T, kWhole>(mars_gradient(t), at);
  raw.h = mars_fetch<T, kWhole>(t.h, at);
  raw.m = mars_fetch<T, kWhole, true>(t.m, at);
  raw.v = mars_fetch<T, kWhole, true>(t.v, at);
  raw.vmax = mars_fetch<T, kWhole, true>(t.vmax, at);
  raw.p = mars_fetch<T, kWhole>(reads_p ? t.p : MarsArray{}, at);
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
  mars_store<T, kWhole, true, false>(x, t.p, at);
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
    if (t.h.data && s.section.write_h) mars_store<T, kWhole, true, false>(g, t.h, at);
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

// ---- kernels
template <class T>
__device__ inline void mars_fill_codes(MarsItem<T>& s) {
  s.codes[0][threadIdx.x] = mars_decode<false>(threadIdx.x);
  s.codes[1][threadIdx.x] = mars_decode<true>(threadIdx.x);
}

// Once all items are done: by the last CTA.
template <class T>
__device__ inline void mars_advance(const MarsParameters& p, MarsItem<T>& s) {
  if (threadIdx.x == 0) s.last = mars_arrive(&mars_counters(p.launch)->done) + 1 == gridDim.x;
  __syncthreads();
  if (!s.last) return;
  mars_with_entries(p, [&](const MarsEntry* entries) {
    for (int i = threadIdx.x; i < p.launch.tensors; i += kMarsThreads)
      if (float* step = entries[i].step; entries[i].counts_steps)
        *step = *step + 1 < float(kMarsMaxStep) ? *step + 1 : float(kMarsMaxStep);
  });
}

template <class T>
__global__ void __launch_bounds__(kMarsThreads, sizeof(T) == 4 ? 2 : 1)
    mars_kernel(const __grid_constant__ MarsParameters p) {
  __shared__ alignas(16) unsigned char storage[sizeof(MarsItem<T>)];
  MarsItem<T>& s = *reinterpret_cast<MarsItem<T>*>(storage);
  if (mars_number(p.launch.found_inf, 0) != 0) return;
  mars_fill_codes(s);
  while (true) {
    if (threadIdx.x == 0) {
      const uint32_t item = atomicAdd(&mars_counters(p.launch)->ticket, 1);
      s.phase = MarsPhase::none;
      if (item < p.launch.items) {
        mars_load(p, item, s);
        if (s.phase != MarsPhase::norm) mars_await(p.launch, s);
      }
    }
    __syncthreads();
    double square;
    if (s.phase == MarsPhase::none) break;
    if (s.phase == MarsPhase::update) {
      mars_quanta(s, [&](const MarsPlace& at, auto whole) {
        mars_update_quantum<T, decltype(whole)::value>(p.launch, s, at);
      });
    } else if (s.phase == MarsPhase::count) {
      mars_count(s);
    } else if (mars_norm(p.launch, s, &square) && threadIdx.x == 0) {
      s.progress->square = square;
      mars_arrive(&s.progress->arrived);
    }
    __syncthreads();
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
int mars_grid(Kernel kernel, int items) {
  int device = 0, sms = 0, resident = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kMarsThreads, 0);
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
  kernel<<<mars_grid(kernel, x.items), kMarsThreads, 0, stream>>>(p);
}
}  // namespace df::cuda
