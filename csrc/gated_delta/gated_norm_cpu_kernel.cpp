// A row is read from memory once and a second time from the cache; vectors run along it. Gradients,
// with n = r x and h = dy silu(gate): that of weight is the sum of h n over the rows, and
//   dn = h weight,  dx = r (dn - n mean(n dn)),  dgate = dy n weight silu'(gate).
#include "common/cpu/math.h"
#include "common/cpu/partial.h"
#include "gated_delta/gated_norm.h"

namespace df::cpu::DF_ISA {
namespace {
template <class E>
const E* row(const Rows& r, int64_t i) {
  return static_cast<const E*>(r.data) + i * r.stride;
}

template <class T, class E>
T square_sum(const E* x, int64_t n) {
  Vec<T> total{};
  over_row<T>(n, [&](int64_t c, auto part) {
    const Vec<T> v = load_part<T>(x + c, part);
    total += v * v;
  });
  return sum<T>(total);
}
template <class T>
T inverse_root(T x) {
  return T(1 / __builtin_sqrt(double(x)));
}

template <class E, bool kGate>
void norm_fwd(const RowNormArgs& p, int64_t first, int64_t last) {
  using T = Compute<E>;
  const T* weight = static_cast<const T*>(p.weight);
  for (int64_t i = first; i < last; ++i) {
    const E *x = row<E>(p.x, i), *gate = row<E>(p.gate, i);
    E* y = static_cast<E*>(p.y) + i * p.V;
    const T r = inverse_root<T>(square_sum<T>(x, p.V) / T(p.V) + T(p.eps));
    over_row<T>(p.V, [&](int64_t c, auto part) {
      Vec<T> n = load_part<T>(x + c, part) * r * load_part<T>(weight + c, part);
      if constexpr (kGate) n *= silu<T>(load_part<T>(gate + c, part));
      store_part<T>(n, y + c, part);
    });
  }
}

template <class E, bool kGate>
void norm_bwd(const RowNormArgs& p, int64_t first, int64_t last, void* sums, void* scratch) {
  using T = Compute<E>;
  const T* weight = static_cast<const T*>(p.weight);
  T *dweight = static_cast<T*>(sums), *dn = static_cast<T*>(scratch);
  for (int64_t i = first; i < last; ++i) {
    const E *x = row<E>(p.x, i), *gate = row<E>(p.gate, i), *dy = row<E>(p.dy, i);
    E *dx = static_cast<E*>(p.y) + i * p.V, *dgate = static_cast<E*>(p.dgate) + i * p.V;
    const T r = inverse_root<T>(square_sum<T>(x, p.V) / T(p.V) + T(p.eps));
    Vec<T> along{};
    over_row<T>(p.V, [&](int64_t c, auto part) {
      const Vec<T> n = load_part<T>(x + c, part) * r, w = load_part<T>(weight + c, part);
      Vec<T> h = load_part<T>(dy + c, part);
      if constexpr (kGate) {
        const Vec<T> z = load_part<T>(gate + c, part), sig = sigmoid<T>(z);
        store_part<T>(h * n * w * sig * (T(1) + z * (T(1) - sig)), dgate + c, part);
        h *= z * sig;
      }
      store_part<T>(load_part<T>(dweight + c, part) + h * n, dweight + c, part);
      const Vec<T> d = h * w;
      store_part<T>(d, dn + c, part);
      along += n * d;
    });
    const T mean = sum<T>(along) / T(p.V);
    over_row<T>(p.V, [&](int64_t c, auto part) {
      const Vec<T> n = load_part<T>(x + c, part) * r;
      store_part<T>((load_part<T>(dn + c, part) - n * mean) * r, dx + c, part);
    });
  }
}

template <class E>
void normalise(const RowNormArgs& p, int64_t first, int64_t last) {
  using T = Compute<E>;
  for (int64_t i = first; i < last; ++i) {
    const E* x = row<E>(p.x, i);
    E* y = static_cast<E*>(p.y) + i * p.V;
    const T r = inverse_root<T>(square_sum<T>(x, p.V) + T(p.eps));
    over_row<T>(p.V, [&](int64_t c, auto part) {
      store_part<T>(load_part<T>(x + c, part) * r, y + c, part);
    });
  }
}

// dx = r (dy - y (y . dy))
template <class E>
void normalise_bwd(const RowNormArgs& p, int64_t first, int64_t last) {
  using T = Compute<E>;
  for (int64_t i = first; i < last; ++i) {
    const E *x = row<E>(p.x, i), *dy = row<E>(p.dy, i);
    E* dx = static_cast<E*>(p.y) + i * p.V;
    const T r = inverse_root<T>(square_sum<T>(x, p.V) + T(p.eps));
    Vec<T> along{};
    over_row<T>(p.V, [&](int64_t c, auto part) {
      along += load_part<T>(x + c, part) * r * load_part<T>(dy + c, part);
    });
    const T dot = sum<T>(along);
    over_row<T>(p.V, [&](int64_t c, auto part) {
      const Vec<T> y = load_part<T>(x + c, part) * r;
      store_part<T>((load_part<T>(dy + c, part) - y * dot) * r, dx + c, part);
    });
  }
}
}  // namespace

void gated_norm_fwd(const RowNormArgs& p, int64_t first, int64_t last) {
  dispatch(p.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    p.gate.data ? norm_fwd<E, true>(p, first, last) : norm_fwd<E, false>(p, first, last);
  });
}

void gated_norm_bwd(const RowNormArgs& p, int64_t first, int64_t last, void* dweight,
                    void* scratch) {
  dispatch(p.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    p.gate.data ? norm_bwd<E, true>(p, first, last, dweight, scratch)
                : norm_bwd<E, false>(p, first, last, dweight, scratch);
  });
}

void l2norm_fwd(const RowNormArgs& p, int64_t first, int64_t last) {
  dispatch(p.dtype, [&](auto type) { normalise<typename decltype(type)::type>(p, first, last); });
}

void l2norm_bwd(const RowNormArgs& p, int64_t first, int64_t last) {
  dispatch(p.dtype,
           [&](auto type) { normalise_bwd<typename decltype(type)::type>(p, first, last); });
}
}  // namespace df::cpu::DF_ISA
