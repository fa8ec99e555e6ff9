// What the backward of the boundary does with tokens; boundary_bwd.cuh has the equations and names.
#pragma once
#include "ddl/boundary_bwd_sums.cuh"

namespace df::cuda {
// Where the rows of a token are, from the beginning of its stage.
struct BwdSlot {
  int g, k, c, x, bytes;
};
template <class T>
__host__ __device__ inline BwdSlot bwd_slot(const BoundaryGrads& p, int items) {
  const int state = items * T::kPieces * 16;
  const int size = p.forward.act == DType::f32 ? 4 : 2;
  const int act = (items * T::kFeatures * size + 31) / 32 * 32;
  BwdSlot at{};
  at.g = state;
  at.k = at.g + (p.d_y.data ? state : 0);
  at.c = at.k + (p.forward.k.data ? act : 0);
  at.x = at.c + (p.d_c.data ? act : 0);
  at.bytes = at.x + (p.d_x_in.data ? act : 0);
  return at;
}

// The scalars of a token in shared memory, for `apply`.
template <class T>
struct BwdTable {
  static constexpr int kU = 0, kE = T::kChannels, kDz = 2 * T::kChannels;
  static constexpr int kRest = (3 * T::kChannels + 3) / 4 * 4;  // s, rho, tau, u.e, h, dz_beta
  static constexpr int kFloats = kRest + 8, kDzBeta = kRest + 5;
};
template <int kCount>
__device__ inline void load_table(uint32_t at, float (&x)[kCount]) {
  if constexpr (kCount < 4) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = lds_float(at + 4 * i);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const uint4 raw = lds128(at + 4 * i);
      x[i] = __uint_as_float(raw.x), x[i + 1] = __uint_as_float(raw.y);
      x[i + 2] = __uint_as_float(raw.z), x[i + 3] = __uint_as_float(raw.w);
    }
  }
}

template <class T>
struct BoundaryBackward {
  static constexpr int kFeatures = T::kFeatures, kChannels = T::kChannels;
  static constexpr int kElements = T::kElements;
  static constexpr int kB = bit_ceil(kChannels + 1), kWidth = kChannels + kB;
  using State = typename T::State;
  using Table = BwdTable<T>;

  const BoundaryBwdLaunch& p;
  const BoundaryArgs& a;
  Group g;
  uint32_t groups_base;  // memory of the first group
  BwdSlot slot;
  WeightView read, W_v, norm, W_beta;
  WeightSums<T> weights;
  bool rewrite, has_y, has_c, has_x, from_context;

  __device__ uint32_t stage(int r, int i) const {
    return groups_base + r * p.plan.group_bytes + i * p.plan.stage_bytes;
  }
  __device__ uint32_t table(int r) const {
    return groups_base + r * p.plan.group_bytes + p.plan.table;
  }

  // ---- rows; the CTA moves them together
  __device__ RowPart state_part(uint32_t at, int part, bool vectors) const {
    const int features = p.plan.part * kFeatures;
    const int inside = min(int(a.d) - part * features, features);
    return {at, T::kPieces, int(sizeof(State)), int(a.d_v), kChannels, features, inside, vectors};
  }
  __device__ RowPart act_part(uint32_t at, int part, bool vectors) const {
    const int features = p.plan.part * kFeatures, size = a.act == DType::f32 ? 4 : 2;
    const int inside = min(int(a.d) - part * features, features);
    return {at, size == 4 ? 2 : 1, size, 1, 1, features, inside, vectors};
  }
  __device__ void fetch_state(const TokenRows& x, int64_t n, uint32_t to, int part,
                              bool vectors) const {
    const int64_t from = int64_t(part) * p.plan.part * kFeatures * a.d_v;
    const State* row = static_cast<const State*>(x.data) + n * x.stride + from;
    fetch(state_part(to, part, vectors), row, threadIdx.x, blockDim.x);
  }
  __device__ void fetch_act(const TokenRows& x, int64_t n, uint32_t to, int part,
                            bool vectors) const {
    if (!x.data) return;
    const int64_t from = n * x.stride + int64_t(part) * p.plan.part * kFeatures;
    const char* row = static_cast<const char*>(x.data) + from * (a.act == DType::f32 ? 4 : 2);
    fetch(act_part(to, part, vectors), row, threadIdx.x, blockDim.x);
  }
  __device__ void fetch_tokens(int64_t first, int i, int part) const {
    for (int r = 0; r < p.plan.groups && first + r < a.N; ++r) {
      const int64_t n = first + r;
      const uint32_t to = stage(r, i);
      fetch_state(a.x, n, to, part, p.y_vectors);
      if (p.grads.d_y.data) fetch_state(p.grads.d_y, n, to + slot.g, part, p.g_vectors);
      fetch_act(a.k, n, to + slot.k, part, p.k_vectors);
      fetch_act(p.grads.d_c, n, to + slot.c, part, p.c_vectors);
      fetch_act(p.grads.d_x_in, n, to + slot.x, part, p.x_vectors);
    }
    commit_copies();
  }
  __device__ void fetch_part(int64_t first, int part) const {  // of a token that does not fit: now
    fetch_tokens(first, 0, part);
    wait_copies<0>();
    __syncthreads();
  }
  __device__ void flush_tokens(int64_t first, int i, int part) const {
    const int64_t from = int64_t(part) * p.plan.part * kFeatures;
    for (int r = 0; r < p.plan.groups && first + r < a.N; ++r) {
      const int64_t at = (first + r) * a.d + from;
      if (!p.direct)
        flush(state_part(stage(r, i), part, p.dx_vectors),
              static_cast<State*>(p.grads.dx) + at * a.d_v, threadIdx.x, blockDim.x);
      if (a.k.data)
        flush(act_part(stage(r, i) + slot.k, part, p.dk_vectors),
              static_cast<char*>(p.grads.dk) + at * (a.act == DType::f32 ? 4 : 2), threadIdx.x,
              blockDim.x);
    }
    // `fetch` may divide the rows otherwise
    if (p.y_vectors != p.dx_vectors || p.k_vectors != p.dk_vectors) __syncthreads();
  }
  __device__ int items_of(int part) const {
    return min(p.plan.part, p.plan.items - part * p.plan.part);
  }

  // ---- scalars, as they are in memory. lanes below 16: of channel j; others: one of the token
  struct Scalars {
    float gate;  // v_j; from lane 16 on s, rho, beta, beta_erase, dz_beta
    float p_j, dz_v;
  };
  __device__ Scalars load_scalars(int64_t n) const {
    Scalars x{0, 0, 0};
    if (n >= a.N) return x;
    const int j = g.lane, d_v = int(a.d_v);
    const auto at = [&](const TokenRows& rows, int i) {
      return rows.data ? __ldg(static_cast<const float*>(rows.data) + n * rows.stride + i) : 0;
    };
    const float* const saved = static_cast<const float*>(a.saved) + n * (d_v + 2);
    if (j < d_v) {
      x.gate = at(a.v, j);
      x.p_j = __ldg(saved + 2 + j);
      x.dz_v = at(p.grads.d_z_v, j);
    } else if (j == 16 || j == 17) {
      x.gate = __ldg(saved + j - 16);
    } else if (j == 18) {
      x.gate = at(a.beta, 0);
    } else if (j == 19) {
      x.gate = at(a.beta_erase, 0);
    } else if (j == 20) {
      x.gate = at(p.grads.d_z_beta, 0);
    }
    return x;
  }

  // ---- an item's weights
  struct ItemWeights {
    float read[kElements], W_v[kElements], gamma[kFeatures], W_beta[kFeatures];
  };
  __device__ void load_item_weights(int item, ItemWeights& w) const {
    const int d = int(a.d), d_v = int(a.d_v);
    if (read.data)
      load_weights(read, ItemPlace<T, true>{item, d, d_v}, w.read);
    else
      fill(w.read, 1.0f / float(d_v));
    if (W_v.data)
      load_weights(W_v, ItemPlace<T, false>{item, d, d_v}, w.W_v);
    else
      fill(w.W_v, 0);
    if (norm.data)
      load_feature_weights<T>(norm, item, d, w.gamma);
    else
      fill(w.gamma, 1);
    if (W_beta.data)
      load_feature_weights<T>(W_beta, item, d, w.W_beta);
    else
      fill(w.W_beta, 0);
  }
  // x, dc, and what goes to dx directly, of an item
  struct Context {
    float x[kFeatures], dc[kFeatures], rest[kFeatures];
  };
  __device__ void context(uint32_t at, int i, const ItemWeights& w, const float (&y)[kElements],
                          const float (&dz)[kChannels], float dz_beta, Context& c) const {
    if (has_c)
      load_features(at + slot.c, i * kFeatures, a.act, c.dc);
    else
      fill(c.dc, 0);
    if (has_x)
      load_features(at + slot.x, i * kFeatures, a.act, c.rest);
    else
      fill(c.rest, 0);
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      c.x[f] = 0;
      float projected = 0;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        c.x[f] += w.read[f * kChannels + j] * y[f * kChannels + j];
        projected += w.W_v[f * kChannels + j] * dz[j];
      }
      c.dc[f] += dz_beta * w.W_beta[f];
      c.dc[f] += from_context ? projected : 0;
      c.rest[f] += from_context ? 0 : projected;
    }
  }
  __device__ void load_states(uint32_t at, int i, float (&y)[kElements],
                              float (&dy)[kElements]) const {
    unpack_item(load_item<T>(at, i), y);
    if (has_y)
      unpack_item(load_item<T>(at + slot.g, i), dy);
    else
      fill(dy, 0);
  }
  __device__ void load_k(uint32_t at, int i, float s, float (&k)[kFeatures]) const {
    if (!rewrite) return fill(k, 0);
    load_features(at + slot.k, i * kFeatures, a.act, k);
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) k[f] *= s;
  }

  // ---- lane j: sum k (G + R (rho m + rest)); sum k R x, and on lane kChannels sum m x
  struct Sums {
    float direct, through_norm;
  };
  __device__ Sums reduce_token(int64_t n, int stage_index, const Scalars& scalars) {
    float direct[kChannels] = {}, through[kB] = {}, dz[kChannels];
    const float s = broadcast(scalars.gate, 16);
    const float rho = p.grads.norm ? broadcast(scalars.gate, 17) : 0;
    const float dz_beta = broadcast(scalars.gate, 20);
#pragma unroll
    for (int j = 0; j < kChannels; ++j) dz[j] = broadcast(scalars.dz_v, j);
    const uint32_t at = stage(g.id, stage_index);
    for (int part = 0; part < p.plan.parts; ++part) {
      if (p.plan.parts > 1) fetch_part(n, part);
      for (int i = g.thread(); i < items_of(part); i += g.threads()) {
        float y[kElements], dy[kElements], k[kFeatures];
        ItemWeights w;
        Context c;
        load_item_weights(part * p.plan.part + i, w);
        load_states(at, i, y, dy);
        load_k(at, i, s, k);
        context(at, i, w, y, dz, dz_beta, c);
#pragma unroll
        for (int f = 0; f < kFeatures; ++f) {
          const float m = w.gamma[f] * c.dc[f], q = rho * m + c.rest[f], kx = k[f] * c.x[f];
          through[kChannels] += m * c.x[f];
#pragma unroll
          for (int j = 0; j < kChannels; ++j) {
            const float R = w.read[f * kChannels + j];
            direct[j] += k[f] * (dy[f * kChannels + j] + R * q);
            through[j] += kx * R;
          }
        }
      }
      if (p.plan.parts > 1) __syncthreads();
    }
    return group_sums(direct, through);
  }
  __device__ Sums group_sums(const float (&direct)[kChannels], const float (&through)[kB]) {
    Sums sums{strided_sum<kChannels>(warp_sum(direct, g.lane)),
              strided_sum<kB>(warp_sum(through, g.lane))};
    const uint32_t buffer = g.buffer();
    if (g.warps > 1) {
      const uint32_t mine = buffer + 4 * (g.warp * kWidth + g.lane);
      if (g.lane < kChannels) sts32(mine, __float_as_uint(sums.direct));
      if (g.lane < kB) sts32(mine + 4 * kChannels, __float_as_uint(sums.through_norm));
    }
    g.sync();
    if (g.warps == 1) return sums;
    return {warps_sum<kChannels>(buffer, g.warps, kWidth, g.lane),
            warps_sum<kB>(buffer + 4 * kChannels, g.warps, kWidth, g.lane)};
  }

  // ---- the token's scalars: to the table, and the gates' gradients; by one warp of the group
  __device__ void conclude(int64_t n, const Scalars& x, const Sums& sums) const {
    const int j = g.lane, d_v = int(a.d_v);
    const bool channel = j < d_v;
    const float s = broadcast(x.gate, 16), rho = p.grads.norm ? broadcast(x.gate, 17) : 0;
    float beta = broadcast(x.gate, 18), beta_slope = 1, v = x.gate, v_slope = 1;
    if (a.beta_logits) {
      const float y = two_sided_sigmoid(beta), rest = two_sided_sigmoid(-beta);
      beta = 2 * y, beta_slope = 2 * y * rest;
    }
    if (a.v_logits) {
      const float y = two_sided_sigmoid(v), rest = two_sided_sigmoid(-v);
      v = float(a.v_scale) * y, v_slope = v * rest;
    }
    const float erase = a.beta_erase.data ? broadcast(x.gate, 19) : beta;
    const float tau = rho * rho * rho * broadcast(sums.through_norm, kChannels) / float(a.d);
    const float through = tau * sums.through_norm;
    const float g_j = channel ? sums.direct - through : 0;
    const float p_j = channel ? x.p_j : 0, v_j = channel ? v : 0;
    const float u = beta * v_j - erase * p_j, e = erase * g_j;
    const float gv = lane_sum<32>(g_j * v_j), gp = lane_sum<32>(g_j * p_j);
    const float ue = lane_sum<32>(u * e), gu = lane_sum<32>(u * g_j);
    if (j < kChannels) {
      sts32(table(g.id) + 4 * (Table::kU + j), __float_as_uint(u));
      sts32(table(g.id) + 4 * (Table::kE + j), __float_as_uint(e));
      sts32(table(g.id) + 4 * (Table::kDz + j), __float_as_uint(channel ? x.dz_v : 0));
    }
    const float h = gu - erase * gp, dz_beta = broadcast(x.gate, 20);
    const float rest = j == 0   ? s
                       : j == 1 ? rho
                       : j == 2 ? tau
                       : j == 3 ? ue
                       : j == 4 ? h
                                : dz_beta;
    if (j < 8) sts32(table(g.id) + 4 * (Table::kRest + j), __float_as_uint(rest));
    if (!a.k.data) return;
    if (channel) static_cast<float*>(p.grads.dv)[n * d_v + j] = beta * g_j * v_slope;
    if (j == 0)
      static_cast<float*>(p.grads.dbeta)[n] = (a.beta_erase.data ? gv : gv - gp) * beta_slope;
    if (j == 1 && a.beta_erase.data) static_cast<float*>(p.grads.dbeta_erase)[n] = -gp;
  }

  // ---- results of an item of one token, and its share of the weights' gradients
  __device__ void apply(int64_t n, int r, uint32_t at, int item, int i, const ItemWeights& w,
                        ItemSums<T>& sums) const {
    const uint32_t row = table(r);
    float y[kElements], dy[kElements], k[kFeatures], dz[kChannels], rest[8];
    Context c;
    load_table(row + 4 * Table::kRest, rest);
    load_states(at, i, y, dy);
    load_k(at, i, rest[0], k);
    load_table(row + 4 * Table::kDz, dz);
    const float rho = rest[1], tau = rest[2], dz_beta = rest[5];
    context(at, i, w, y, dz, dz_beta, c);
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      const float m = w.gamma[f] * c.dc[f], normed = c.x[f] * rho, to_c = w.gamma[f] * normed;
      const float dx = rho * m - tau * c.x[f] + c.rest[f];
      const float source = from_context ? to_c : c.x[f];
      sums.gamma[f] += c.dc[f] * normed;
      sums.W_beta[f] += dz_beta * to_c;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        sums.read[f * kChannels + j] += dx * y[f * kChannels + j];
        sums.W_v[f * kChannels + j] += dz[j] * source;
        dy[f * kChannels + j] += dx * w.read[f * kChannels + j];
      }
    }
    if (rewrite) apply_rewrite(row, at, i, rest, k, y, dy);
    const Packed<T> raw = pack_item<T>(dy);
    if (p.direct) {
      State* const to = static_cast<State*>(p.grads.dx) + n * a.d * a.d_v;
      __stcg(reinterpret_cast<uint4*>(to + int64_t(item) * kElements), raw.piece[0]);
    } else {
      store_item(at, i, raw);
    }
  }
  // dy: G^, becomes dX; dk~ takes the place of k~
  __device__ void apply_rewrite(uint32_t row, uint32_t at, int i, const float (&rest)[8],
                                const float (&k)[kFeatures], const float (&y)[kElements],
                                float (&dy)[kElements]) const {
    float u[kChannels], e[kChannels], dk[kFeatures];
    load_table(row + 4 * Table::kU, u);
    load_table(row + 4 * Table::kE, e);
    const float s = rest[0], ue = rest[3], h = rest[4];
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) {
      dk[f] = k[f] * ue;
#pragma unroll
      for (int j = 0; j < kChannels; ++j) {
        const int n = f * kChannels + j;
        dk[f] += dy[n] * u[j] - y[n] * e[j];
        dy[n] -= k[f] * e[j];
      }
      if (a.normalize_k) dk[f] = s * (dk[f] - h * k[f]);
    }
    store_features(at + slot.k, i * kFeatures, a.act, dk);
  }
  __device__ void apply_round(int64_t first, int stage_index, int part) const {
    for (int i = threadIdx.x; i < items_of(part); i += blockDim.x) {
      const int item = part * p.plan.part + i;
      ItemWeights w;
      ItemSums<T> sums;
      load_item_weights(item, w);
      for (int r = 0; r < p.plan.groups && first + r < a.N; ++r)
        apply(first + r, r, stage(r, stage_index), item, i, w, sums);
      if (p.partials) weights.add_item(item, sums);
    }
  }
  // The sum over a round's tokens for the bias that this thread has: b_v from 0 on, then b_beta.
  __device__ float bias_round(int64_t first) const {
    const int i = threadIdx.x;
    if (i > kChannels) return 0;
    float sum = 0;
    for (int r = 0; r < p.plan.groups && first + r < a.N; ++r)
      sum += lds_float(table(r) + 4 * (i < kChannels ? Table::kDz + i : Table::kDzBeta));
    return sum;
  }
};
}  // namespace df::cuda
