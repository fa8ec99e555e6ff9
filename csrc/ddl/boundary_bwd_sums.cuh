// The gradients of the weights in the backward of the boundary: a CTA's sums over its tokens, as
// float in shared memory, or in its row of partial sums in global memory where they do not fit. An
// item has one owner in a CTA.
#pragma once
#include "ddl/boundary_plan.cuh"

namespace df::cuda {
struct BoundaryBwdLaunch {
  BoundaryGrads grads;
  BoundaryPlan plan;
  BoundarySums sums;
  float* partials;  // [grid, boundary_partial_stride]; null: none
  bool y_vectors, g_vectors, k_vectors, c_vectors, x_vectors, dx_vectors, dk_vectors;
  bool direct;  // items of dX are 16 bytes that go straight to global memory
};

template <class T>
constexpr int kBwdWarps = T::kFeatures == 8 || T::kChannels == 16 ? 8
                          : T::kFeatures == 4                     ? 12
                                                                  : 16;
// An item's share of one round of tokens.
template <class T>
struct ItemSums {
  float read[T::kElements] = {}, W_v[T::kElements] = {};
  float gamma[T::kFeatures] = {}, W_beta[T::kFeatures] = {};
};

template <class T>
struct WeightSums {
  static constexpr int kFeatures = T::kFeatures, kChannels = T::kChannels;

  const BoundaryBwdLaunch& p;
  const BoundaryArgs& a;
  uint32_t memory;  // of the CTA

  __device__ float* partial(int64_t begin) const {
    return p.partials + blockIdx.x * boundary_partial_stride(p.sums) + begin;
  }
  template <int kCount, class Place>
  __device__ void add(int offset, int swizzle, int first_unit, int64_t begin,
                      const float (&x)[kCount], Place place) const {
    if (offset < 0) {
#pragma unroll
      for (int n = 0; n < kCount; ++n)
        if (const int64_t i = place(n); i >= 0) {
          float* const to = partial(begin) + i;
          __stcg(to, __ldcg(to) + x[n]);
        }
      return;
    }
#pragma unroll
    for (int u = 0; u < kCount / 4; ++u) {
      const uint32_t at = memory + offset + 16 * swizzled(first_unit + u, swizzle);
      uint4 sum = lds128(at);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        word_of(sum, i) = __float_as_uint(__uint_as_float(word_of(sum, i)) + x[4 * u + i]);
      sts128(at, sum);
    }
  }
  __device__ void add_features(int offset, int item, int64_t begin,
                               const float (&x)[kFeatures]) const {
    if (offset < 0 || kFeatures >= 4)
      return add(offset, 2, item * kFeatures / 4, begin, x, FeaturePlace<T>{item, int(a.d)});
    float sum[kFeatures];
    load_features(memory + offset, item * kFeatures, DType::f32, sum);
#pragma unroll
    for (int f = 0; f < kFeatures; ++f) sum[f] += x[f];
    store_features(memory + offset, item * kFeatures, DType::f32, sum);
  }
  __device__ void add_item(int item, const ItemSums<T>& sums) const {
    const int d = int(a.d), d_v = int(a.d_v), unit = item * T::kUnits;
    if (a.read.data)
      add(p.plan.sum_read, T::kUnits, unit, p.sums.read, sums.read,
          ItemPlace<T, true>{item, d, d_v});
    if (a.W_v.data)
      add(p.plan.sum_W_v, T::kUnits, unit, p.sums.W_v, sums.W_v, ItemPlace<T, false>{item, d, d_v});
    if (a.norm.data) add_features(p.plan.sum_norm, item, p.sums.norm, sums.gamma);
    if (a.W_beta.data) add_features(p.plan.sum_W_beta, item, p.sums.W_beta, sums.W_beta);
  }
  // fn(offset, units and their swizzle in shared memory, begin, count, element of place i)
  template <class Fn>
  __device__ void each_sum(Fn fn) const {
    const int d = int(a.d), d_v = int(a.d_v);
    const int items = p.plan.items * T::kUnits, features = (p.plan.items * kFeatures + 7) / 8 * 2;
    const auto feature = [](int i) { return i; };
    if (a.read.data)
      fn(p.plan.sum_read, items, T::kUnits, p.sums.read, d * d_v,
         [=](int i) { return i / d_v * kChannels + i % d_v; });
    if (a.W_v.data)
      fn(p.plan.sum_W_v, items, T::kUnits, p.sums.W_v, d * d_v,
         [=](int i) { return i % d * kChannels + i / d; });
    if (a.norm.data) fn(p.plan.sum_norm, features, 2, p.sums.norm, d, feature);
    if (a.W_beta.data) fn(p.plan.sum_W_beta, features, 2, p.sums.W_beta, d, feature);
  }
  __device__ void clear() const {
    each_sum([&](int offset, int units, int, int64_t begin, int count, auto) {
      if (offset < 0)
        for (int i = threadIdx.x; i < count; i += blockDim.x) __stcg(partial(begin) + i, 0.0f);
      else
        for (int i = threadIdx.x; i < units; i += blockDim.x)
          sts128(memory + offset + 16 * i, make_uint4(0, 0, 0, 0));
    });
  }
  __device__ void store() const {
    each_sum([&](int offset, int, int swizzle, int64_t begin, int count, auto element) {
      if (offset < 0) return;
      for (int i = threadIdx.x; i < count; i += blockDim.x) {
        const int e = element(i);
        const uint32_t at = memory + offset + 16 * swizzled(e / 4, swizzle) + 4 * (e % 4);
        __stcg(partial(begin) + i, lds_float(at));
      }
    });
  }
  __device__ void store_biases(float sum) const {
    const int i = threadIdx.x;
    if (a.W_v.data && i < a.d_v) *(partial(p.sums.b_v) + i) = sum;
    if (a.W_beta.data && i == kChannels) *partial(p.sums.b_beta) = sum;
  }
};
}  // namespace df::cuda
