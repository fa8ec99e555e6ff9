// Token shift, y_t = p_t x_{t-1} + c_t x_t for every head, and with G = dy (zero outside):
//   dx_t = c_t G_t + p_{t+1} G_{t+1};  dp_t = G_t . x_{t-1};  dc_t = G_t . x_t;  dcache = p_0 G_0
//
// CTA = (chunk of tokens, 128 threads along the heads). A thread owns 128 bits of a head and walks
// the chunk, forward in time for y and backward for the gradients, with the token before it (after
// it) in registers, so that HBM sees each element once; kStep tokens are requested together.
// Backward, the 1 to 32 lanes that share a head (the next power of two; D = 96 leaves a quarter of
// them idle) add the two dot products by shuffles. Heads of more than 32 vectors have a kernel in
// which a warp walks along the head and reads x_{t-1} and G_{t+1} from L2.
// Rows that are not 16-byte aligned, or no whole vectors, are moved element by element to the same
// lanes: the same bits. Shared memory: none. Registers: at most 128.
// Bytes a token and element: 2 e forward, 3 e backward (e bytes an element); the weights are
// 8 / D a token. FLOPs: 3 and 7. Bound by memory.
#include "common/cuda/pack.cuh"
#include "common/cuda/reduce.cuh"
#include "common/cuda/sequences.cuh"
#include "ddl/shift.h"

namespace df::cuda {
namespace {
constexpr int kThreads = 128;

template <class E, bool kAligned_>
struct Config {
  using Element = E;
  static constexpr bool kAligned = kAligned_;
  static constexpr int kVec = 16 / sizeof(E), kStep = kAligned ? 4 : 2;
  using Vector = Pack<E, kVec>;
};

int64_t vectors(const ShiftShape& s, int64_t width) {  // of a head
  return (s.D + width - 1) / width;
}
int64_t chunk_of(const ShiftShape& s) {
  int64_t chunk = 64;  // fill a GPU; 8 elements a thread
  while (chunk > 8 && s.B * s.T * s.H * s.D < int64_t(132 * 512) * 8 * chunk) chunk /= 2;
  return chunk;
}
int64_t chunks(const ShiftShape& s) {
  return s.B * ((s.T + chunk_of(s) - 1) / chunk_of(s));
}

// What a thread works on: elements [d, d + count) of head h; columns of threads a chunk.
struct Place {
  int64_t b, begin, end, h, d, count;
};
template <class C>
__device__ inline Place place(const ShiftShape& s, int64_t chunk, int64_t columns, int64_t lanes) {
  const int64_t ctas = (columns + kThreads - 1) / kThreads, per_row = (s.T + chunk - 1) / chunk;
  const int64_t i = blockIdx.x / ctas, column = blockIdx.x % ctas * kThreads + threadIdx.x;
  Place at;
  at.b = i / per_row;
  at.begin = i % per_row * chunk;
  at.end = at.begin + chunk < s.T ? at.begin + chunk : s.T;
  at.h = column / lanes, at.d = column % lanes * C::kVec;
  at.count = at.h < s.H ? s.D - at.d : 0;
  return at;
}

template <class C>
__device__ inline void load(typename C::Vector& v, const typename C::Element* p, int64_t count) {
  if constexpr (C::kAligned) {
    count > 0 ? v.load(p) : v.zero();
  } else {
    v.load_some(p, count);
  }
}
template <class C>
__device__ inline void store(const typename C::Vector& v, typename C::Element* p, int64_t count) {
  if constexpr (C::kAligned) {
    if (count > 0) v.store(p);
  } else {
    v.store_some(p, count);
  }
}

template <class E>
__device__ inline const E* at_token(const ShiftHeads& x, const Place& at, int64_t t) {
  return static_cast<const E*>(x.data) + at.b * x.b + t * x.t + at.h * x.h + at.d;
}
__device__ inline float weight(const ShiftHeads& w, int64_t b, int64_t t, int64_t h) {
  return static_cast<const float*>(w.data)[b * w.b + t * w.t + h * w.h];
}
__device__ inline int64_t output(const ShiftShape& s, const Place& at, int64_t t) {
  return ((at.b * s.T + t) * s.H + at.h) * s.D + at.d;
}
// x_{t-1}, from the cache or zero at the start of a sequence.
template <class C>
__device__ inline void load_before(typename C::Vector& v, const ShiftHeads& x, const void* cache,
                                   const ShiftShape& s, const Span& span, const Place& at,
                                   int64_t t) {
  using E = typename C::Element;
  if (t > span.first) return load<C>(v, at_token<E>(x, at, t - 1), at.count);
  const E* const from = static_cast<const E*>(cache) + (span.n * s.H + at.h) * s.D + at.d;
  cache ? load<C>(v, from, at.count) : v.zero();
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    shift_fwd_kernel(const __grid_constant__ ShiftFwdArgs p,
                     const __grid_constant__ Offsets offsets, int64_t chunk) {
  using E = typename C::Element;
  const ShiftShape& s = p.shape;
  const int64_t lanes = (s.D + C::kVec - 1) / C::kVec;
  const Place at = place<C>(s, chunk, s.H * lanes, lanes);
  if (at.count <= 0) return;
  for (int64_t t = at.begin; t < at.end;) {
    const Span span = span_of(offsets, at.b, t);
    const int64_t end = span.last < at.end ? span.last : at.end;
    typename C::Vector before, next[C::kStep];
    if (span.n == s.N) {  // behind the last sequence
      before.zero();
      for (; t < end; ++t) store<C>(before, static_cast<E*>(p.y) + output(s, at, t), at.count);
      continue;
    }
    load_before<C>(before, p.x, p.cache, s, span, at, t);
    for (; t < end; t += C::kStep) {
#pragma unroll
      for (int u = 0; u < C::kStep; ++u)
        if (t + u < end) load<C>(next[u], at_token<E>(p.x, at, t + u), at.count);
#pragma unroll
      for (int u = 0; u < C::kStep; ++u) {
        if (t + u >= end) break;
        const float previous = weight(p.previous, at.b, t + u, at.h);
        const float current = weight(p.current, at.b, t + u, at.h);
        typename C::Vector y;
#pragma unroll
        for (int i = 0; i < C::kVec; ++i)
          y.set(i, __fmaf_rn(current, next[u][i], __fmul_rn(previous, before[i])));
        store<C>(y, static_cast<E*>(p.y) + output(s, at, t + u), at.count);
        before = next[u];
      }
    }
    t = end;
  }
}

template <class V>
__device__ inline float dot(const V& a, const V& b, float sum) {
#pragma unroll
  for (int i = 0; i < int(sizeof(V) / sizeof(a.elements[0])); ++i) sum = __fmaf_rn(a[i], b[i], sum);
  return sum;
}

// dx_t of one vector.
template <class C>
__device__ inline void store_dx(const ShiftBwdArgs& p, const Span& span, const Place& at, int64_t t,
                                float current, float later, const typename C::Vector& g,
                                const typename C::Vector& next) {
  const ShiftShape& s = p.shape;
  const float* const passed =
      p.d_last && t + 1 == span.last
          ? static_cast<const float*>(p.d_last) + (span.n * s.H + at.h) * s.D + at.d
          : nullptr;
  typename C::Vector dx;
#pragma unroll
  for (int i = 0; i < C::kVec; ++i) {
    float d = __fmaf_rn(later, next[i], __fmul_rn(current, g[i]));
    if (passed && i < at.count) d = __fadd_rn(d, passed[i]);
    dx.set(i, d);
  }
  store<C>(dx, static_cast<typename C::Element*>(p.dx) + output(s, at, t), at.count);
}

// Sums over the lanes of a head to their place; every lane of the warp takes part.
__device__ inline void store_dots(const ShiftBwdArgs& p, const Place& at, int64_t t, int lanes,
                                  float with_old, float with_new) {
  for (int mask = 1; mask < lanes; mask *= 2) {
    with_old += __shfl_xor_sync(0xffffffffu, with_old, mask);
    with_new += __shfl_xor_sync(0xffffffffu, with_new, mask);
  }
  if (at.h >= p.shape.H || threadIdx.x % lanes != 0) return;
  const int64_t to = (at.b * p.shape.T + t) * p.shape.H + at.h;
  static_cast<float*>(p.d_previous)[to] = with_old;
  static_cast<float*>(p.d_current)[to] = with_new;
}

// Tokens behind the last sequence: nothing reached them.
template <class C>
__device__ inline void store_nothing(const ShiftBwdArgs& p, Place at, int64_t t, int lanes) {
  typename C::Vector none;
  none.zero();
  for (; at.count > 0; at.d += lanes * C::kVec, at.count -= lanes * C::kVec)
    store<C>(none, static_cast<typename C::Element*>(p.dx) + output(p.shape, at, t), at.count);
  store_dots(p, at, t, lanes, 0, 0);
}

template <class C>
__global__ void __launch_bounds__(kThreads, 3)
    shift_bwd_kernel(const __grid_constant__ ShiftBwdArgs p,
                     const __grid_constant__ Offsets offsets, int64_t chunk, int lanes) {
  using E = typename C::Element;
  const ShiftShape& s = p.shape;
  const Place at = place<C>(s, chunk, s.H * lanes, lanes);
  const int64_t h = at.h < s.H ? at.h : 0;  // idle lanes read some weight, and use none
  for (int64_t t = at.end - 1; t >= at.begin;) {
    const Span span = span_of(offsets, at.b, t);
    const int64_t begin = span.first > at.begin ? span.first : at.begin;
    if (span.n == s.N) {
      for (; t >= begin; --t) store_nothing<C>(p, at, t, lanes);
      continue;
    }
    typename C::Vector next, x, g[C::kStep], before[C::kStep];  // next: of dy at t + 1
    const bool inside = t + 1 < span.last;
    load<C>(next, at_token<E>(p.dy, at, inside ? t + 1 : t), inside ? at.count : 0);
    load<C>(x, at_token<E>(p.x, at, t), at.count);
    for (; t >= begin; t -= C::kStep) {
#pragma unroll
      for (int u = 0; u < C::kStep; ++u)
        if (t - u >= begin) {
          load<C>(g[u], at_token<E>(p.dy, at, t - u), at.count);
          load_before<C>(before[u], p.x, p.cache, s, span, at, t - u);
        }
#pragma unroll
      for (int u = 0; u < C::kStep; ++u) {
        if (t - u < begin) break;
        const float current = weight(p.current, at.b, t - u, h);
        const float later = t - u + 1 < span.last ? weight(p.previous, at.b, t - u + 1, h) : 0;
        store_dx<C>(p, span, at, t - u, current, later, g[u], next);
        store_dots(p, at, t - u, lanes, dot(g[u], before[u], 0), dot(g[u], x, 0));
        next = g[u], x = before[u];
      }
    }
    t = begin - 1;
  }
}

template <class C>
__global__ void __launch_bounds__(kThreads)
    shift_bwd_wide_kernel(const __grid_constant__ ShiftBwdArgs p,
                          const __grid_constant__ Offsets offsets, int64_t chunk) {
  using E = typename C::Element;
  const ShiftShape& s = p.shape;
  const Place start = place<C>(s, chunk, s.H * 32, 32);
  for (int64_t t = start.end - 1; t >= start.begin && start.h < s.H; --t) {
    const Span span = span_of(offsets, start.b, t);
    if (span.n == s.N) {
      store_nothing<C>(p, start, t, 32);
      continue;
    }
    const bool inside = t + 1 < span.last;
    const float current = weight(p.current, start.b, t, start.h);
    const float later = inside ? weight(p.previous, start.b, t + 1, start.h) : 0;
    float with_old = 0, with_new = 0;
    for (Place at = start; at.count > 0; at.d += 32 * C::kVec, at.count -= 32 * C::kVec) {
      typename C::Vector g, next, x, before;
      load<C>(g, at_token<E>(p.dy, at, t), at.count);
      load<C>(next, at_token<E>(p.dy, at, inside ? t + 1 : t), inside ? at.count : 0);
      load<C>(x, at_token<E>(p.x, at, t), at.count);
      load_before<C>(before, p.x, p.cache, s, span, at, t);
      store_dx<C>(p, span, at, t, current, later, g, next);
      with_old = dot(g, before, with_old), with_new = dot(g, x, with_new);
    }
    store_dots(p, start, t, 32, with_old, with_new);
  }
}

struct StateElement {
  int64_t n, h, d, b;
};
__device__ inline StateElement state_element(const ShiftShape& s, const Offsets& o, int64_t i) {
  const int64_t n = i / (s.H * s.D);
  return {n, i / s.D % s.H, i % s.D, o.data ? 0 : n};
}

// The last token of every sequence, or its cache; an element a thread.
template <class E>
__global__ void __launch_bounds__(kThreads)
    shift_last_kernel(const __grid_constant__ ShiftFwdArgs p,
                      const __grid_constant__ Offsets offsets) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.shape.N * p.shape.H * p.shape.D) return;
  const StateElement at = state_element(p.shape, offsets, i);
  const Span span = sequence(offsets, at.n);
  E value{};
  if (span.first < span.last)
    value = static_cast<const E*>(
        p.x.data)[at.b * p.x.b + (span.last - 1) * p.x.t + at.h * p.x.h + at.d];
  else if (p.cache)
    value = static_cast<const E*>(p.cache)[i];
  static_cast<E*>(p.last)[i] = value;
}

// Gradient of the cache: of the first token, or what the new cache passes on.
template <class E>
__global__ void __launch_bounds__(kThreads)
    shift_cache_kernel(const __grid_constant__ ShiftBwdArgs p,
                       const __grid_constant__ Offsets offsets) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.shape.N * p.shape.H * p.shape.D) return;
  const StateElement at = state_element(p.shape, offsets, i);
  const Span span = sequence(offsets, at.n);
  float d = p.d_last ? static_cast<const float*>(p.d_last)[i] : 0;
  if (span.first < span.last) {
    const E g = static_cast<const E*>(
        p.dy.data)[at.b * p.dy.b + span.first * p.dy.t + at.h * p.dy.h + at.d];
    d = __fmul_rn(weight(p.previous, at.b, span.first, at.h), to_float(g));
  }
  static_cast<float*>(p.d_cache)[i] = d;
}

template <class E>
bool aligned(const ShiftShape& s, const ShiftHeads& x) {
  constexpr int64_t kVec = 16 / sizeof(E);
  return s.D % kVec == 0 && x.b % kVec == 0 && x.t % kVec == 0 && x.h % kVec == 0 &&
         on_boundary(x.data, 16);
}
unsigned grid(int64_t threads, int64_t times) {
  return unsigned((threads + kThreads - 1) / kThreads * times);
}

template <class E>
void fwd_launch(const ShiftFwdArgs& p, const Offsets& offsets, cudaStream_t stream) {
  const ShiftShape& s = p.shape;
  const int64_t states = s.N * s.H * s.D, threads = s.H * vectors(s, 16 / sizeof(E));
  if (s.B * s.T * s.H * s.D != 0) {
    const bool whole = aligned<E>(s, p.x) && on_boundary(p.y, 16) && on_boundary(p.cache, 16);
    auto* kernel = whole ? &shift_fwd_kernel<Config<E, true>> : &shift_fwd_kernel<Config<E, false>>;
    kernel<<<grid(threads, chunks(s)), kThreads, 0, stream>>>(p, offsets, chunk_of(s));
  }
  if (p.last && states != 0)
    shift_last_kernel<E><<<grid(states, 1), kThreads, 0, stream>>>(p, offsets);
}

template <class E>
void bwd_launch(const ShiftBwdArgs& p, const Offsets& offsets, cudaStream_t stream) {
  const ShiftShape& s = p.shape;
  const int64_t states = s.N * s.H * s.D, count = vectors(s, 16 / sizeof(E));
  const bool whole = aligned<E>(s, p.x) && aligned<E>(s, p.dy) && on_boundary(p.dx, 16) &&
                     on_boundary(p.cache, 16);
  if (s.B * s.T * s.H != 0 && count <= 32) {
    int lanes = 1;
    while (lanes < count) lanes *= 2;
    auto* kernel = whole ? &shift_bwd_kernel<Config<E, true>> : &shift_bwd_kernel<Config<E, false>>;
    kernel<<<grid(s.H * lanes, chunks(s)), kThreads, 0, stream>>>(p, offsets, chunk_of(s), lanes);
  } else if (s.B * s.T * s.H != 0) {
    auto* kernel =
        whole ? &shift_bwd_wide_kernel<Config<E, true>> : &shift_bwd_wide_kernel<Config<E, false>>;
    kernel<<<grid(s.H * 32, chunks(s)), kThreads, 0, stream>>>(p, offsets, chunk_of(s));
  }
  if (p.d_cache && states != 0)
    shift_cache_kernel<E><<<grid(states, 1), kThreads, 0, stream>>>(p, offsets);
}
}  // namespace
}  // namespace df::cuda

void df::shift_fwd_cuda(const ShiftFwdArgs& args, const Offsets& offsets, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.x.dtype) {
    case DType::f32: return cuda::fwd_launch<float>(args, offsets, on);
    case DType::bf16: return cuda::fwd_launch<bf16>(args, offsets, on);
    default: return cuda::fwd_launch<f16>(args, offsets, on);
  }
}
void df::shift_bwd_cuda(const ShiftBwdArgs& args, const Offsets& offsets, void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  switch (args.x.dtype) {
    case DType::f32: return cuda::bwd_launch<float>(args, offsets, on);
    case DType::bf16: return cuda::bwd_launch<bf16>(args, offsets, on);
    default: return cuda::bwd_launch<f16>(args, offsets, on);
  }
}
