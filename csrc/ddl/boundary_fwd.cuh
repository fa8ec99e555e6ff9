// Forward of the boundary (equations in boundary.h), a token X [d, d_v] at a time:
//   s = (sum k~^2 + eps^2)^-1/2,  p_j = s sum_i k~_i X_ij,  Y_ij = X_ij + s k~_i u_j
//   x_i = sum_j R_ij Y_ij,  rho = (mean x^2 + eps)^-1/2,  c_i = gamma_i x_i rho
//   z_v = W_v (x or c) + b_v,  z_beta = W_beta c + b_beta
//
// Whole rows with the rewrite have the kernel of boundary_fwd_whole.cuh; this one takes all others.
// One persistent launch. A group of 1 to 16 warps, 8 items (boundary_tile.cuh) a thread, owns a
// token; a CTA of up to 16 warps is several groups that share the weights. A group:
//   fetch   the rows of X and k~ as they are, by cp.async, one or two tokens ahead
//   read    |k~|^2 and k~^T X                  -> first sum over the group, s, p, u
//   write   Y, rounded; x of the rounded Y; sum x^2 and the projections' products -> second sum
//   finish  c and x_in, 4 features a thread; rows of Y that were not stored by items
// X stays in shared memory from load to store: global memory sees each byte once. |k~|^2 outside of
// float's range repeats `read` with k~ times a power of two. All sums have an order that depends on
// d and d_v alone: a token's result is the same anywhere, and with or without the read-out.
//
// Shared memory: weights as float (4 d (2 d_v + 2) bytes; those that do not fit are read from L2),
// and for a group 1 to 3 stages of a token's rows and x as float. d = 2048, d_v = 4, bfloat16:
// 80 KB, and 2 groups of 3 * 20 + 8 KB. A token that does not fit at all (65536 floats) passes in
// parts, whose second reading comes from L2. Item accesses have no bank conflicts.
// Registers: at most 122 (one CTA of 16 warps an SM has 128); no spills.
// Bytes a token: 2 d_v b + 2 a a feature (b, a: bytes of the state and of k~, c). FLOPs: 8 d_v + 10
// a feature, in some 130 instructions an item for float d_v = 4 and 600 a token and warp: bound by
// issuing these, not by memory.
#pragma once
#include "ddl/boundary_plan.cuh"

namespace df::cuda {
struct BoundaryFwdLaunch {
  BoundaryArgs a;
  BoundaryPlan plan;
  bool x_vectors, k_vectors, y_vectors, c_vectors;
  bool direct;  // items of Y are 16 bytes that go straight to global memory
};

template <class T>
struct BoundaryForward {
  static constexpr int kFeatures = T::kFeatures, kChannels = T::kChannels;
  static constexpr int kRead = bit_ceil(kChannels + 1), kWrite = bit_ceil(kChannels + 2);
  using State = typename T::State;

  const BoundaryFwdLaunch& p;
  Group g;
  uint32_t base;  // the group's memory
  WeightView read, W_v, norm, W_beta;
  bool readout, rewrite, from_context;
  float mean;  // 1 / d_v without a read-out weight, else 1

  // ---- rows
  __device__ RowPart state_part(uint32_t stage, int part, bool vectors) const {
    const int from = part * p.plan.part * kFeatures, features = p.plan.part * kFeatures;
    return {stage,     T::kPieces, int(sizeof(State)),     int(p.a.d_v),
            kChannels, features,   inside(from, features), vectors};
  }
  __device__ RowPart k_part(uint32_t stage, int part) const {
    const int from = part * p.plan.part * kFeatures, features = p.plan.part * kFeatures;
    const int size = p.a.act == DType::f32 ? 4 : 2;
    return {stage + p.plan.part * T::kPieces * 16,
            size == 4 ? 2 : 1,
            size,
            1,
            1,
            features,
            inside(from, features),
            p.k_vectors};
  }
  __device__ int inside(int from, int features) const { return min(int(p.a.d) - from, features); }
  __device__ uint32_t stage(int i) const { return base + i * p.plan.stage_bytes; }

  __device__ void fetch_token(int64_t n, uint32_t to, int part) const {
    if (n < p.a.N) {
      const int64_t from = int64_t(part) * p.plan.part * kFeatures;
      const State* x = static_cast<const State*>(p.a.x.data) + n * p.a.x.stride + from * p.a.d_v;
      fetch(state_part(to, part, p.x_vectors), x, g.thread(), g.threads());
      if (p.a.k.data) {
        const int size = p.a.act == DType::f32 ? 4 : 2;
        const char* k = static_cast<const char*>(p.a.k.data) + (n * p.a.k.stride + from) * size;
        fetch(k_part(to, part), k, g.thread(), g.threads());
      }
    }
    commit_copies();
  }
  // A part of a token that does not fit: now.
  __device__ void fetch_part(int64_t n, int part) const {
    fetch_token(n, stage(0), part);
    wait_copies<0>();
    g.sync();
  }
  // fn(item of the token, item of the part) for the thread's items of a part
  template <class Fn>
  __device__ void each_item(int part, Fn fn) const {
    const int first = part * p.plan.part, count = min(p.plan.part, p.plan.items - first);
    for (int i = g.thread(); i < count; i += g.threads()) fn(first + i, i);
  }
  __device__ void load_k(uint32_t stage, int i, float scale, float (&k)[kFeatures]) const {
    load_features(stage + p.plan.part * T::kPieces * 16, i * kFeatures, p.a.act, k);
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) k[f] *= scale;
  }

  // ---- lane j: sum_i k_i X_ij, lane kChannels: sum k^2, of k = scale k~
  __device__ float read_token(int64_t n, uint32_t stage, float scale) {
    float sums[kRead] = {};
    for (int part = 0; part < p.plan.parts; ++part) {
      if (p.plan.parts > 1) fetch_part(n, part);
      each_item(part, [&](int, int i) {
        float k[kFeatures], x[T::kElements];
        load_k(stage, i, scale, k);
        unpack_item(load_item<T>(stage, i), x);
#pragma unroll
        for (int f = 0; f < kFeatures; ++f) {
          sums[kChannels] += k[f] * k[f];
#pragma unroll
          for (int j = 0; j < kChannels; ++j) sums[j] += k[f] * x[f * kChannels + j];
        }
      });
      if (p.plan.parts > 1) g.sync();
    }
    return group_sum(g, sums);
  }
  __device__ float largest_k(int64_t n, uint32_t stage) {
    float largest = 0;
    for (int part = 0; part < p.plan.parts; ++part) {
      if (p.plan.parts > 1) fetch_part(n, part);
      each_item(part, [&](int, int i) {
        float k[kFeatures];
        load_k(stage, i, 1, k);
#pragma unroll
        for (int f = 0; f < kFeatures; ++f) largest = fmaxf(largest, fabsf(k[f]));
      });
      if (p.plan.parts > 1) g.sync();
    }
    return group_max(g, largest);
  }

  struct Direction {
    float scale, factor;  // k = k~ scale factor
    float p;              // lane j: p_j
    __device__ float s() const { return fminf(scale * factor, 3.4028235e38f); }
  };
  // read(scale) is read_token of k~ times scale, largest() the largest |k~|
  template <class Read, class Largest>
  __device__ Direction direction(Read read, Largest largest_of) {
    float sums = read(1);
    if (!p.a.normalize_k) return {1, 1, sums};
    const float eps = float(p.a.k_eps);
    float square = broadcast(sums, kChannels) + eps * eps, scale = 1;
    if (!(square <= 3.4028235e38f) || square < 1e-30f) {
      const float largest = fmaxf(largest_of(), eps);
      if (largest == 0) return {1, 0, 0};
      // a power of two near 1 / largest, a normal number
      const int exponent = int(__float_as_uint(largest) >> 23);
      scale = __uint_as_float(uint32_t(min(max(254 - exponent, 1), 252)) << 23);
      sums = read(scale);
      square = broadcast(sums, kChannels) + (eps * scale) * (eps * scale);
    }
    const float factor = 1.0f / sqrtf(square);
    return {scale, factor, sums * factor};
  }

  // ---- lane j: u_j, of the gates v (lanes below 16), beta and beta_erase (the next two)
  __device__ float load_gate(int64_t n) const {
    if (!p.a.k.data || n >= p.a.N) return 0;
    const auto at = [&](const TokenRows& x, int j) {
      return __ldg(static_cast<const float*>(x.data) + n * x.stride + j);
    };
    if (g.lane < p.a.d_v) return at(p.a.v, g.lane);
    if (g.lane == 16) return at(p.a.beta, 0);
    return g.lane == 17 && p.a.beta_erase.data ? at(p.a.beta_erase, 0) : 0;
  }
  __device__ float update(float gate, float p_j) const {
    const bool is_v = g.lane < p.a.d_v;
    const float share = two_sided_sigmoid(gate);  // one for all lanes: no branches
    if (is_v && p.a.v_logits) gate = float(p.a.v_scale) * share;
    if (g.lane == 16 && p.a.beta_logits) gate = 2 * share;
    const float beta = broadcast(gate, 16), erase = broadcast(gate, 17);
    return is_v ? beta * gate - (p.a.beta_erase.data ? erase : beta) * p_j : 0;
  }

  // ---- Y to global memory or into X's place, x into the group's array; lane j: z_j without rho
  // and bias, then sum x^2 and z_beta
  __device__ float write_token(int64_t n, uint32_t stage, const Direction& k_by, float u_lane) {
    float u[kChannels], sums[kWrite] = {};
#pragma unroll
    for (int j = 0; j < kChannels; ++j) u[j] = broadcast(u_lane, j);
    State* const row = static_cast<State*>(p.a.y) + n * p.a.d * p.a.d_v;
    for (int part = 0; part < p.plan.parts; ++part) {
      if (p.plan.parts > 1) fetch_part(n, part);
      each_item(part, [&](int item, int i) {
        float y[T::kElements];
        Packed<T> raw = load_item<T>(stage, i);
        unpack_item(raw, y);
        if (rewrite) {
          raw = rewritten(stage, i, k_by, u, y);
          if (p.direct)
            __stcg(reinterpret_cast<uint4*>(row + int64_t(item) * T::kElements), raw.piece[0]);
          else
            store_item(stage, i, raw);
          unpack_item(raw, y);
        }
        if (readout) read_out(item, y, sums);
      });
      if (p.plan.parts > 1) {
        g.sync();
        flush_y(n, stage, part);
        g.sync();
      }
    }
    wait_copies_but(p.plan.stages - 2);
    if (readout) return group_sum(g, sums);
    g.sync();
    return 0;
  }
  __device__ Packed<T> rewritten(uint32_t stage, int i, const Direction& k_by,
                                 const float (&u)[kChannels], float (&y)[T::kElements]) const {
    float k[kFeatures];
    load_k(stage, i, k_by.scale, k);
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      k[f] *= k_by.factor;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) y[f * kChannels + j] += k[f] * u[j];
    }
    return pack_item<T>(y);
  }
  __device__ void flush_y(int64_t n, uint32_t stage, int part) const {
    if (!p.a.k.data || p.direct) return;
    const int64_t from = int64_t(part) * p.plan.part * kFeatures;
    State* const y = static_cast<State*>(p.a.y) + (n * p.a.d + from) * p.a.d_v;
    flush(state_part(stage, part, p.y_vectors), y, g.thread(), g.threads());
    if (p.x_vectors != p.y_vectors) g.sync();  // `fetch` divides the row otherwise
  }
  __device__ void read_out(int item, const float (&y)[T::kElements], float (&sums)[kWrite]) const {
    const int d = int(p.a.d), d_v = int(p.a.d_v);
    float w[T::kElements], x[kFeatures], c[kFeatures], gamma[kFeatures];
    if (read.data)
      load_weights(read, ItemPlace<T, true>{item, d, d_v}, w);
    else
      fill(w, 1);
    if (norm.data)
      load_feature_weights<T>(norm, item, d, gamma);
    else
      fill(gamma, 1);
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      x[f] = 0;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) x[f] += y[f * kChannels + j] * w[f * kChannels + j];
      x[f] *= mean;
      sums[kChannels] += x[f] * x[f];
      c[f] = gamma[f] * x[f];
    }
    store_features(base + p.plan.x, item * kFeatures, DType::f32, x);
    if (W_beta.data) {
      load_feature_weights<T>(W_beta, item, d, gamma);
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) sums[kChannels + 1] += gamma[f] * c[f];
    }
    if (W_v.data) {
      load_weights(W_v, ItemPlace<T, false>{item, d, d_v}, w);
#pragma unroll
      for (int f = 0; f < kFeatures; ++f) {
        const float source = from_context ? c[f] : x[f];
#pragma unroll
        for (int j = 0; j < kChannels; ++j) sums[j] += w[f * kChannels + j] * source;
      }
    }
  }

  // ---- what the second sum was for
  __device__ void finish_token(int64_t n, const Direction& k_by, float sums) const {
    const float rho = readout ? rho_of(sums) : 0;
    store_numbers(n, k_by, sums, rho);
    if (p.a.x_in) store_rows(n, p.a.x_in, [](float x, float) { return x; });
    if (p.a.c) store_rows(n, p.a.c, [&](float x, float gamma) { return gamma * (x * rho); });
  }
  __device__ float rho_of(float sums) const {
    const float square = broadcast(sums, kChannels);
    return 1.0f / sqrtf(square / float(p.a.d) + float(p.a.norm_eps));
  }
  __device__ void store_numbers(int64_t n, const Direction& k_by, float sums, float rho) const {
    const int d_v = int(p.a.d_v), lane = g.lane;
    if (g.warp == 0) {
      if (p.a.z_v && lane < d_v) {
        const float b = p.a.b_v.data ? load_any(p.a.b_v.data, p.a.b_v.type, lane) : 0;
        static_cast<float*>(p.a.z_v)[n * d_v + lane] = sums * (p.a.v_from_context ? rho : 1) + b;
      }
      if (p.a.z_beta && lane == kChannels + 1) {
        const float b = p.a.b_beta.data ? load_any(p.a.b_beta.data, p.a.b_beta.type, 0) : 0;
        static_cast<float*>(p.a.z_beta)[n] = sums * rho + b;
      }
      const float p_j = __shfl_sync(0xffffffffu, k_by.p, (lane - 2) & 31);
      const float saved = lane == 0 ? k_by.s() : lane == 1 ? rho : p_j;
      if (p.a.saved && lane < d_v + 2) static_cast<float*>(p.a.saved)[n * (d_v + 2) + lane] = saved;
    }
  }
  // fn(x, gamma) of each feature, 4 at a time
  template <class Fn>
  __device__ void store_rows(int64_t n, void* to, Fn fn) const {
    const int d = int(p.a.d);
    const uint32_t sX = base + p.plan.x;
    if (p.c_vectors) {
      for (int i = 4 * g.thread(); i < d; i += 4 * g.threads()) {
        float x[4], gamma[4] = {1, 1, 1, 1};
        load_features(sX, i, DType::f32, x);
        if (norm.staged)
          load_features(norm.shared, i, DType::f32, gamma);
        else if (norm.vectors)
          load_run<4>(norm, i, gamma);
        else if (norm.data)
          load_each(norm, gamma, [&](int f) { return i + f; });
#pragma unroll
        for (int f = 0; f < 4; ++f) x[f] = fn(x[f], gamma[f]);
        const int64_t at = n * d + i;
        if (p.a.act == DType::f32)
          store_vector(static_cast<float*>(to) + at, x);
        else
          __stcg(reinterpret_cast<uint2*>(static_cast<uint16_t*>(to) + at),
                 make_uint2(pack(x[0], x[1], p.a.act), pack(x[2], x[3], p.a.act)));
      }
    } else {
      for (int i = g.thread(); i < d; i += g.threads()) {
        const float gamma = p.a.norm.data ? load_any(p.a.norm.data, p.a.norm.type, i) : 1;
        const float x = lds_float(sX + 16 * swizzled(i / 4, 2) + 4 * (i % 4));
        store_any(fn(x, gamma), to, p.a.act, n * d + i);
      }
    }
  }
};

template <class T>
__global__ void __launch_bounds__(kBoundaryWarps * 32, 1)
    boundary_fwd_kernel(const __grid_constant__ BoundaryFwdLaunch p) {
  extern __shared__ uint4 memory[];
  const uint32_t shared = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  const BoundaryPlan& plan = p.plan;
  const int warp = threadIdx.x / 32, id = warp / plan.warps, d = int(p.a.d), d_v = int(p.a.d_v);
  const uint32_t base = shared + plan.base + id * plan.group_bytes;
  BoundaryForward<T> x{p,
                       {plan.warps, id, warp % plan.warps, int(threadIdx.x % 32),
                        base + plan.reduction, BoundaryForward<T>::kWrite, 0},
                       base,
                       view_of<T>(p.a.read, p.a, shared, plan.read),
                       view_of<T>(p.a.W_v, p.a, shared, plan.W_v),
                       view_of<T>(p.a.norm, p.a, shared, plan.norm),
                       view_of<T>(p.a.W_beta, p.a, shared, plan.W_beta),
                       p.a.c || p.a.x_in || p.a.z_v || p.a.z_beta,
                       p.a.k.data != nullptr,
                       p.a.v_from_context,
                       p.a.read.data ? 1 : 1.0f / float(d_v)};

  const int64_t step = int64_t(gridDim.x) * plan.groups;
  int64_t n = int64_t(blockIdx.x) * plan.groups + id;
  if (plan.parts == 1)
    for (int i = 0; i < plan.stages; ++i) x.fetch_token(n + i * step, x.stage(i), 0);
  float gate = x.load_gate(n);
  stage_weights<T>(x.read, plan.items, ItemPlace<T, true>{0, d, d_v});
  stage_weights<T>(x.W_v, plan.items, ItemPlace<T, false>{0, d, d_v});
  stage_feature_weights<T>(x.norm, plan.items, d);
  stage_feature_weights<T>(x.W_beta, plan.items, d);
  wait_copies_but(plan.stages - 1);
  __syncthreads();

  for (int i = 0; n < p.a.N; n += step, i = i + 1 < plan.stages ? i + 1 : 0) {
    const uint32_t stage = x.stage(i);
    typename BoundaryForward<T>::Direction k_by{1, 0, 0};
    float u = 0;
    if (p.a.k.data) {
      k_by = x.direction([&](float scale) { return x.read_token(n, stage, scale); },
                         [&] { return x.largest_k(n, stage); });
      u = x.update(gate, k_by.p);
    } else {
      x.g.sync();  // the token before is finished
    }
    gate = x.load_gate(n + step);
    const float sums = x.write_token(n, stage, k_by, u);  // the next token's rows are there, too
    x.finish_token(n, k_by, sums);
    if (plan.parts > 1) continue;
    x.flush_y(n, stage, 0);
    x.fetch_token(n + plan.stages * step, stage, 0);
    if (plan.stages == 1) {
      wait_copies<0>();
      x.g.sync();
    }
  }
}

template <class T>
BoundaryPlanner<T> boundary_fwd_planner(const BoundaryArgs& a) {
  const auto stage_bytes = [&a](int items) {
    const int k = a.k.data ? round_up(int64_t(items) * T::kFeatures * size_of(a.act), 32) : 0;
    return items * T::kPieces * 16 + k;
  };
  BoundaryPlanner<T> planner{a,   boundary_device(), kBoundaryWarps,
                             256, kBoundaryWarps,    stage_bytes};
  planner.token_bytes = round_up((a.d + T::kFeatures) * 4, 32);
  planner.width = BoundaryForward<T>::kWrite;
  return planner;
}

template <class T>
BoundaryFwdLaunch boundary_fwd_rows(const BoundaryArgs& a) {
  const int size = sizeof(typename T::State);
  const bool whole = a.d_v == T::kChannels;
  const TokenRows y{a.y, a.d * a.d_v};
  BoundaryFwdLaunch p{a};
  p.x_vectors = whole && whole_vectors(a.x, a.d * a.d_v, size);
  p.k_vectors = whole_vectors(a.k, a.d, size_of(a.act));
  p.y_vectors = whole && whole_vectors(y, a.d * a.d_v, size);
  p.c_vectors = a.d % 4 == 0;
  p.direct = p.y_vectors && T::kPieces == 1;
  return p;
}
}  // namespace df::cuda
