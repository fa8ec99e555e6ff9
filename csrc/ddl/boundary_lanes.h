// A state row is d features of d_v neighbouring channels: kLanes features are d_v vectors, vector q
// of which holds elements [q kLanes, (q + 1) kLanes) of them. Between these and one vector with an
// element a feature:
//   spread  every lane gets its feature's element
//   fold    every feature gets the sum of its channels
// and for numbers that go with channels:
//   Periodic   every lane has its channel's number
//   channel_sums   every channel gets the sum of its lanes
// kDv is d_v, or 0 where that is known at run time only.
#pragma once
#include "common/cpu/math.h"
#include "ddl/boundary.h"

namespace df::cpu::DF_ISA {
template <class T>
using Indices = Vec<typename Bits<T>::I>;

template <class T, int kDv>
struct Lanes {
  static constexpr int kL = kLanes<T>, kMax = kDv ? kDv : kMaxChannels;
  static constexpr bool kAligned = kDv && kL % (kDv ? kDv : 1) == 0;  // all vectors start alike
  int run_time_d_v;
  Indices<T> feature[kMax];

  explicit Lanes(int64_t d_v) : run_time_d_v(int(d_v)) {
    for (int q = 0; q < count(); ++q)
      for (int l = 0; l < kL; ++l) feature[q][l] = (q * kL + l) / count();
  }
  int count() const { return kDv ? kDv : run_time_d_v; }

  Vec<T> spread(Vec<T> x, int q) const {
    return kDv == 1 ? x : Vec<T>(__builtin_shuffle(x, feature[q]));
  }

  Vec<T> fold(const Vec<T> (&x)[kMax]) const {
    if constexpr (kDv) {
      return fold_pairs<kDv>(x);
    } else {
      T each[kMax * kL];
      __builtin_memcpy(each, x, count() * sizeof(x[0]));
      Vec<T> y{};
      for (int l = 0; l < kL; ++l)
        for (int j = 0; j < count(); ++j) y[l] += each[l * count() + j];
      return y;
    }
  }

  void channel_sums(const Vec<T> (&x)[kMax], T* sums) const {
    T each[kMax * kL];
    int n = count() * kL;
    if constexpr (kAligned) {
      Vec<T> total = x[0];
      for (int q = 1; q < kDv; ++q) total += x[q];
      store(each, total);
      n = kL;
    } else {
      __builtin_memcpy(each, x, n * sizeof(T));
    }
    for (int j = 0; j < count(); ++j) {
      T sum = 0;
      for (int i = j; i < n; i += count()) sum += each[i];
      sums[j] = sum;
    }
  }

 private:
  template <int kCount>
  static Vec<T> fold_pairs(const Vec<T>* x) {
    if constexpr (kCount == 1) {
      return x[0];
    } else {
      const Vec<T> a = fold_pairs<kCount / 2>(x), b = fold_pairs<kCount / 2>(x + kCount / 2);
      Indices<T> even, odd;
      for (int l = 0; l < kL; ++l) even[l] = 2 * l, odd[l] = 2 * l + 1;
      return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
  }
};

template <class T, int kDv>
class Periodic {
  using L = Lanes<T, kDv>;

 public:
  Periodic(const L& lanes, const T* numbers) {
    const int vectors = L::kAligned ? 1 : lanes.count();
    for (int i = 0, j = 0; i < vectors * L::kL; ++i, j = j + 1 == lanes.count() ? 0 : j + 1)
      at_[i / L::kL][i % L::kL] = numbers[j];
  }
  Vec<T> operator[](int q) const { return at_[L::kAligned ? 0 : q]; }

 private:
  Vec<T> at_[L::kMax];
};

// fn(first feature, first element of the state) for every kLanes features.
template <class T, int kDv, class Fn>
inline void over_features(const Lanes<T, kDv>& lanes, int64_t padded, Fn fn) {
  for (int64_t i = 0; i < padded; i += kLanes<T>) fn(i, i * lanes.count());
}
}  // namespace df::cpu::DF_ISA
