// Work items of the MARS kernels (mars_kernel.cuh): the table and the workspace, how a CTA finds
// the item of a ticket and what its work depends on, a warp's quanta of it.
#pragma once
#include "mars/mars_launch.h"
#include "mars/mars_memory.cuh"

namespace df::cuda {
constexpr int kMarsWarps = 7, kMarsThreads = kMarsWarps * 32;  // that work on an item

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

// An item with all that its work depends on; in shared memory.
template <class T>
struct MarsWork {
  MarsPhase phase;
  int32_t chunk;
  uint32_t step;
  MarsProgress* progress;
  MarsEntry entry;
  MarsSection section;
  MarsConstants<T> y;
};
// What the CTA works on, and its exchange.
template <class T>
struct MarsItem : MarsWork<T> {
  bool last;  // this CTA was the last one to arrive
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
__device__ inline void mars_constants(const MarsLaunch& p, MarsWork<T>& s) {
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
__device__ inline void mars_await(const MarsLaunch& p, MarsWork<T>& s) {
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
                                MarsWork<T>& s) {
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
__device__ inline void mars_load(const MarsParameters& p, int item, MarsWork<T>& s) {
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
  constexpr int64_t kQuanta = kMarsCudaChunk / kMarsQuantum;
  const int64_t n = s.entry.tensor.n, begin = s.chunk * kQuanta;
  const int64_t all = (n + kMarsQuantum - 1) / kMarsQuantum;
  const int64_t end = begin + kQuanta < all ? begin + kQuanta : all;
  for (int64_t q = begin + threadIdx.x / 32; q < end; q += kMarsWarps) {
    if (s.entry.access != MarsAccess::single && (q + 1) * kMarsQuantum <= n)
      fn(MarsPlace{q, n}, std::true_type{});
    else
      fn(MarsPlace{q, n}, std::false_type{});
  }
}

__device__ inline MarsArray mars_gradient(const MarsTensor& t) {
  return {const_cast<void*>(t.g), t.g_type};
}
}  // namespace df::cuda
