// Forward of the boundary with the rewrite (equations in boundary.h) where all rows are whole: d_v
// is 1, 2, 4, 8 or 16, k~ and c have the state's type, every row is a number of aligned 16-byte
// pieces, a token fits into shared memory and so do all weights. Other calls take the kernel of
// boundary_fwd.cuh. The order of every sum is the same in both.
//
// What that one decides in each item is known here when compiling: types, which parts there are
// (kParts: rewrite; also read-out and norm; also projections), where weights are. Absent weights of
// a part are constants in shared memory. So an item of four floats costs some 45 instructions:
//   fetch   1 cp.async, ahead by 1 to 2 tokens
//   read    2 loads from shared memory, 5 FMA                     -> first sum over the group
//   write   4 loads, the store of Y, that of x; 14 FP32 (26 with projections) -> second sum
//   finish  3/4 of an access, 2 FP32
// and a token some 500 a warp for its two sums, gates and norms: hence 8 items a lane, few warps.
//
// A group of W = items / 256 warps owns a token, groups are as many as make even rounds. A thread
// requests the shared memory of kBatch items before the first value is used.
// Shared memory as in boundary_fwd.cuh; float, d = 768, d_v = 4: 4 groups of 3 warps, each 3 stages
// of 15 KB and x of 3 KB, weights 15 KB: 212 KB, of which 184 KB are requested when it starts.
// Registers: at most 128; no spills. Bound by memory: (2 d_v + 2) sizeof(element) a feature.
#pragma once
#include "ddl/boundary_fwd.cuh"

namespace df::cuda {
enum BoundaryParts : int { kRewrite, kWithReadout, kWithProjections };

template <int kCount>
struct BoundaryCount {
  static constexpr int value = kCount;
};

template <class T, int kParts>
struct BoundaryWhole : BoundaryForward<T> {
  using Base = BoundaryForward<T>;
  using Base::base, Base::from_context, Base::g, Base::norm, Base::p, Base::read, Base::W_beta,
      Base::W_v;
  using typename Base::Direction;
  using typename Base::State;
  static constexpr int kFeatures = T::kFeatures, kChannels = T::kChannels;
  static constexpr int kElements = T::kElements, kPieces = T::kPieces;
  static constexpr bool kReadout = kParts >= kWithReadout, kProjects = kParts >= kWithProjections;
  static constexpr int kLive = kElements * (kProjects ? 2 : 1);  // of an item's registers
  static constexpr int kBatch = kLive <= 4 ? 4 : kLive <= 8 ? 2 : 1;
  static constexpr int kUnitsOfFloats = kFeatures == 8 ? 2 : 1;  // of an item's features as float

  // ---- places in shared memory
  // Unit h of item i, of n units an item: `swizzled`, of which only the lane matters.
  __device__ uint32_t unit(uint32_t at, int i, int n, int h) const {
    return at + 16 * (i * n + (h ^ (g.lane * n >> 3 & (n - 1))));
  }
  __device__ uint32_t k_rows(uint32_t stage) const { return stage + p.plan.items * kPieces * 16; }
  __device__ Packed<T> item(uint32_t stage, int i) const {
    Packed<T> raw;
#pragma unroll
    for (int h = 0; h < kPieces; ++h) raw.piece[h] = lds128(unit(stage, i, kPieces, h));
    return raw;
  }
  __device__ void load_k(uint32_t stage, int i, float scale, float (&k)[kFeatures]) const {
    const uint32_t at = k_rows(stage) + i * kFeatures * int(sizeof(State));
    load_features(at, 0, kTypeOf<State>, k);
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) k[f] *= scale;
  }
  template <int kCount>  // floats of whole units
  __device__ void load_units(uint32_t at, int i, float (&x)[kCount]) const {
#pragma unroll
    for (int h = 0; h < kCount / 4; ++h) {
      const uint4 raw = lds128(unit(at, i, kCount / 4, h));
      x[4 * h] = __uint_as_float(raw.x), x[4 * h + 1] = __uint_as_float(raw.y);
      x[4 * h + 2] = __uint_as_float(raw.z), x[4 * h + 3] = __uint_as_float(raw.w);
    }
  }
  __device__ void load_floats(uint32_t at, int i, float (&x)[kFeatures]) const {
    if constexpr (kFeatures == 8)
      load_units(at, i, x);
    else
      load_features(at + 4 * kFeatures * i, 0, DType::f32, x);
  }
  __device__ void store_floats(uint32_t at, int i, const float (&x)[kFeatures]) const {
    const auto bits = [&](int n) { return __float_as_uint(x[n]); };
    if constexpr (kFeatures == 8) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        sts128(unit(at, i, 2, h),
               make_uint4(bits(4 * h), bits(4 * h + 1), bits(4 * h + 2), bits(4 * h + 3)));
    } else {
      store_features(at + 4 * kFeatures * i, 0, DType::f32, x);
    }
  }

  // ---- rows
  template <int kSwizzle>
  __device__ void copy_units(uint32_t to, const void* from, int units) const {
    const char* const row = static_cast<const char*>(from);
#pragma unroll 4
    for (int u = g.thread(); u < units; u += g.threads())
      copy_async(to + 16 * swizzled(u, kSwizzle), row + 16 * u);
  }
  __device__ void fetch_rows(int64_t n, uint32_t to) const {
    if (n < p.a.N) {
      const State* const x = static_cast<const State*>(p.a.x.data) + n * p.a.x.stride;
      const State* const k = static_cast<const State*>(p.a.k.data) + n * p.a.k.stride;
      copy_units<kPieces>(to, x, p.plan.items * kPieces);
      copy_units<1>(k_rows(to), k, int(p.a.d) * int(sizeof(State)) / 16);
    }
    commit_copies();
  }
  // fn(item, count): that item of the thread and the next ones, `count` in all
  template <class Fn>
  __device__ void each_batch(Fn fn) const {
    const int step = g.threads();
    int i = g.thread();
    if constexpr (kBatch > 1)
      for (; i + (kBatch - 1) * step < p.plan.items; i += kBatch * step)
        fn(i, BoundaryCount<kBatch>{});
    for (; i < p.plan.items; i += step) fn(i, BoundaryCount<1>{});
  }

  // ---- lane j: sum_i k_i X_ij, lane kChannels: sum k^2, of k = scale k~
  __device__ float read_rows(uint32_t stage, float scale) {
    float sums[Base::kRead] = {};
    each_batch([&](int first, auto count) {
      constexpr int kCount = decltype(count)::value;
      Packed<T> raw[kCount];
      float k[kCount][kFeatures];
#pragma unroll
      for (int b = 0; b < kCount; ++b) {
        raw[b] = item(stage, first + b * g.threads());
        load_k(stage, first + b * g.threads(), scale, k[b]);
      }
#pragma unroll
      for (int b = 0; b < kCount; ++b) {
        float x[kElements];
        unpack_item(raw[b], x);
#pragma unroll
        for (int f = 0; f < kFeatures; ++f) {
          sums[kChannels] += k[b][f] * k[b][f];
#pragma unroll
          for (int j = 0; j < kChannels; ++j) sums[j] += k[b][f] * x[f * kChannels + j];
        }
      }
    });
    return group_sum(g, sums);
  }
  __device__ float largest_of_row(uint32_t stage) {
    float largest = 0;
    for (int i = g.thread(); i < p.plan.items; i += g.threads()) {
      float k[kFeatures];
      load_k(stage, i, 1, k);
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) largest = fmaxf(largest, fabsf(k[f]));
    }
    return group_max(g, largest);
  }

  // ---- Y, x; lane j: z_j without rho and bias, then sum x^2 and z_beta
  struct Weights {  // of an item
    float read[kElements], W_v[kElements], gamma[kFeatures], W_beta[kFeatures];
  };
  __device__ void load_weights_of(int i, Weights& w) const {
    load_units(read.shared, i, w.read);
    if constexpr (kProjects) {
      load_floats(norm.shared, i, w.gamma);
      load_floats(W_beta.shared, i, w.W_beta);
      load_units(W_v.shared, i, w.W_v);
    }
  }
  __device__ float write_rows(int64_t n, uint32_t stage, const Direction& k_by, float u_lane) {
    float u[kChannels], sums[Base::kWrite] = {};
#pragma unroll
    for (int j = 0; j < kChannels; ++j) u[j] = broadcast(u_lane, j);
    State* const row = static_cast<State*>(p.a.y) + n * p.a.d * kChannels;
    each_batch([&](int first, auto count) {
      constexpr int kCount = decltype(count)::value;
      Packed<T> raw[kCount];
      float k[kCount][kFeatures];
      [[maybe_unused]] Weights w[kCount];
#pragma unroll
      for (int b = 0; b < kCount; ++b) {
        raw[b] = item(stage, first + b * g.threads());
        load_k(stage, first + b * g.threads(), k_by.scale, k[b]);
        if constexpr (kReadout) load_weights_of(first + b * g.threads(), w[b]);
      }
#pragma unroll
      for (int b = 0; b < kCount; ++b) {
        const int i = first + b * g.threads();
        float y[kElements];
        unpack_item(raw[b], y);
#pragma unroll
        for (int f = 0; f < kFeatures; ++f) {
          k[b][f] *= k_by.factor;
#pragma unroll
          for (int j = 0; j < kChannels; ++j) y[f * kChannels + j] += k[b][f] * u[j];
        }
        raw[b] = pack_item<T>(y);
        if constexpr (kPieces == 1)
          __stcg(reinterpret_cast<uint4*>(row + int64_t(i) * kElements), raw[b].piece[0]);
        else
          for (int h = 0; h < kPieces; ++h) sts128(unit(stage, i, kPieces, h), raw[b].piece[h]);
        unpack_item(raw[b], y);
        if constexpr (kReadout) read_out_item(i, y, w[b], sums);
      }
    });
    wait_copies_but(p.plan.stages - 2);
    if constexpr (kReadout) return group_sum(g, sums);
    g.sync();
    return 0;
  }
  __device__ void read_out_item(int i, const float (&y)[kElements], const Weights& w,
                                float (&sums)[Base::kWrite]) const {
    float x[kFeatures];
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      x[f] = 0;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) x[f] += y[f * kChannels + j] * w.read[f * kChannels + j];
      sums[kChannels] += x[f] * x[f];
      if constexpr (kProjects) {
        const float c = w.gamma[f] * x[f];
        sums[kChannels + 1] += w.W_beta[f] * c;
#pragma unroll
        for (int j = 0; j < kChannels; ++j)
          sums[j] += w.W_v[f * kChannels + j] * (from_context ? c : x[f]);
      }
    }
    store_floats(base + p.plan.x, i, x);
  }

  // ---- what the second sum was for; Y of several pieces an item, which left its place by items
  __device__ void finish_rows(int64_t n, uint32_t stage, const Direction& k_by, float sums) const {
    const float rho = kReadout ? this->rho_of(sums) : 0;
    this->store_numbers(n, k_by, sums, rho);
    if constexpr (kReadout) {
      if (p.a.x_in) store_features_of(n, p.a.x_in, [](float x, float) { return x; });
      if (p.a.c) store_features_of(n, p.a.c, [&](float x, float w) { return w * (x * rho); });
    }
    if constexpr (kPieces > 1) {
      uint4* const y = reinterpret_cast<uint4*>(static_cast<State*>(p.a.y) + n * p.a.d * kChannels);
      for (int u = g.thread(); u < p.plan.items * kPieces; u += g.threads())
        __stcg(y + u, lds128(stage + 16 * swizzled(u, kPieces)));
    }
  }
  // fn(x, gamma) of each feature, 4 at a time
  template <class Fn>
  __device__ void store_features_of(int64_t n, void* to, Fn fn) const {
    State* const row = static_cast<State*>(to) + n * p.a.d;
#pragma unroll 2
    for (int u = g.thread(); 4 * u < int(p.a.d); u += g.threads()) {
      float x[4], gamma[4];
      const int at = 16 * swizzled(u, kUnitsOfFloats);
      load_features(base + p.plan.x + at, 0, DType::f32, x);
      load_features(norm.shared + at, 0, DType::f32, gamma);
#pragma unroll
      for (int f = 0; f < 4; ++f) x[f] = fn(x[f], gamma[f]);
      if constexpr (sizeof(State) == 4)
        store_vector(row + 4 * u, x);
      else
        __stcg(reinterpret_cast<uint2*>(row + 4 * u),
               make_uint2(pack(x[0], x[1], kTypeOf<State>), pack(x[2], x[3], kTypeOf<State>)));
    }
  }

  // ---- weights, by the whole CTA
  static __device__ bool is_copied(const WeightView& w) {
    return w.vectors && w.type == DType::f32;
  }
  template <int kSwizzle>
  static __device__ void copy_weight(const WeightView& w, int units) {
    if (!is_copied(w)) return;
    for (int u = threadIdx.x; u < units; u += blockDim.x)
      copy_async(w.shared + 16 * swizzled(u, kSwizzle), static_cast<const float4*>(w.data) + u);
  }
  // place(e): of element e in the weight
  template <int kSwizzle, class Place>
  static __device__ void fill_weight(const WeightView& w, int count, float absent, Place place) {
#pragma unroll 4
    for (int e = threadIdx.x; e < count; e += blockDim.x) {
      const float x = w.data ? load_any(w.data, w.type, place(e)) : absent;
      sts32(w.shared + 16 * swizzled(e / 4, kSwizzle) + 4 * (e % 4), __float_as_uint(x));
    }
  }
  // What is as it has to be, asynchronously, with the first token's rows.
  __device__ void copy_weights() const {
    const int d = int(p.a.d);
    if constexpr (kReadout) {
      copy_weight<T::kUnits>(read, d * kChannels / 4);
      copy_weight<kUnitsOfFloats>(norm, d / 4);
    }
    if constexpr (kProjects) copy_weight<kUnitsOfFloats>(W_beta, d / 4);
  }
  __device__ void fill_weights() const {
    const int d = int(p.a.d);
    const auto same = [](int e) { return e; };
    if constexpr (kReadout) {
      if (!is_copied(read)) fill_weight<T::kUnits>(read, d * kChannels, 1.0f / kChannels, same);
      if (!is_copied(norm)) fill_weight<kUnitsOfFloats>(norm, d, 1, same);
    }
    if constexpr (kProjects) {
      const auto transposed = [&](int e) { return e % kChannels * d + e / kChannels; };
      if (!is_copied(W_beta)) fill_weight<kUnitsOfFloats>(W_beta, d, 0, same);
      fill_weight<T::kUnits>(W_v, d * kChannels, 0, transposed);
    }
  }
};

template <class T, int kParts>
__global__ void __launch_bounds__(kBoundaryWarps * 32, 1)
    boundary_fwd_whole_kernel(const __grid_constant__ BoundaryFwdLaunch p) {
  extern __shared__ uint4 memory[];
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const BoundaryPlan& plan = p.plan;
  const int warp = threadIdx.x / 32, id = warp / plan.warps;
  const uint32_t base = shared + plan.base + id * plan.group_bytes;
  BoundaryWhole<T, kParts> x{{p,
                              {plan.warps, id, warp % plan.warps, int(threadIdx.x % 32),
                               base + plan.reduction, BoundaryForward<T>::kWrite, 0},
                              base,
                              view_of<T>(p.a.read, p.a, shared, plan.read),
                              view_of<T>(p.a.W_v, p.a, shared, plan.W_v),
                              view_of<T>(p.a.norm, p.a, shared, plan.norm),
                              view_of<T>(p.a.W_beta, p.a, shared, plan.W_beta),
                              kParts >= kWithReadout,
                              true,
                              p.a.v_from_context,
                              1}};
  const int64_t step = int64_t(gridDim.x) * plan.groups;
  int64_t n = int64_t(blockIdx.x) * plan.groups + id;
  x.copy_weights();
  for (int i = 0; i < plan.stages; ++i) x.fetch_rows(n + i * step, x.stage(i));
  float gate = x.load_gate(n);
  x.fill_weights();
  wait_copies_but(plan.stages - 1);
  __syncthreads();

  for (int i = 0; n < p.a.N; n += step, i = i + 1 < plan.stages ? i + 1 : 0) {
    const uint32_t stage = x.stage(i);
    const auto k_by = x.direction([&](float scale) { return x.read_rows(stage, scale); },
                                  [&] { return x.largest_of_row(stage); });
    const float u = x.update(gate, k_by.p);
    gate = x.load_gate(n + step);
    const float sums = x.write_rows(n, stage, k_by, u);  // the next token's rows are there, too
    x.finish_rows(n, stage, k_by, sums);
    x.fetch_rows(n + plan.stages * step, stage);
    if (plan.stages == 1) {
      wait_copies<0>();
      x.g.sync();
    }
  }
}

// False: the call is not for this kernel.
template <class T, int kParts>
bool boundary_fwd_whole_launch(BoundaryFwdLaunch p, BoundaryPlanner<T> planner, void* stream) {
  planner.readout = kParts >= kWithReadout, planner.projections = kParts >= kWithProjections;
  if (kParts == kRewrite) planner.token_bytes = 0;
  if (!planner.choose_even()) return false;
  const auto kernel = boundary_fwd_whole_kernel<T, kParts>;
  BoundaryPlan& plan = planner.plan;
  plan.x = plan.stages * plan.stage_bytes;
  plan.reduction = plan.x + int(planner.token_bytes);
  planner.size_grid(kernel);
  p.plan = plan;
  kernel<<<plan.grid, plan.groups * plan.warps * 32, plan.bytes,
           static_cast<cudaStream_t>(stream)>>>(p);
  return true;
}

template <class T>
bool boundary_fwd_any_launch(BoundaryFwdLaunch p, BoundaryPlanner<T> planner, void* stream) {
  planner.choose();
  BoundaryPlan& plan = planner.plan;
  plan.x = plan.stages * plan.stage_bytes;
  plan.reduction = plan.x + int(planner.token_bytes);
  planner.size_grid(boundary_fwd_kernel<T>);
  p.plan = plan;
  boundary_fwd_kernel<T>
      <<<plan.grid, plan.groups * plan.warps * 32, plan.bytes, static_cast<cudaStream_t>(stream)>>>(
          p);
  return true;
}

// False: a token's features do not fit.
template <class E>
bool boundary_fwd_launch(const BoundaryArgs& a, void* stream) {
  return with_tile<E>(a.d_v, [&](auto tile) {
    using T = decltype(tile);
    BoundaryPlanner<T> planner = boundary_fwd_planner<T>(a);
    if (!planner.divide()) return false;
    const BoundaryFwdLaunch p = boundary_fwd_rows<T>(a);
    const bool whole = p.x_vectors && p.k_vectors && p.y_vectors && p.c_vectors && a.k.data &&
                       a.act == a.state && planner.plan.parts == 1;
    const bool projections = a.z_v || a.z_beta, readout = projections || a.c || a.x_in;
    if (whole && (projections ? boundary_fwd_whole_launch<T, kWithProjections>(p, planner, stream)
                  : readout   ? boundary_fwd_whole_launch<T, kWithReadout>(p, planner, stream)
                              : boundary_fwd_whole_launch<T, kRewrite>(p, planner, stream)))
      return true;
    return boundary_fwd_any_launch(p, planner, stream);
  });
}
}  // namespace df::cuda
