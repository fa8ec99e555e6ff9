// Vectors run along the D elements of a head. Backward, with G = dy and zero outside the sequence:
//   dx_t = c_t G_t + p_{t+1} G_{t+1};  dp_t = G_t . x_{t-1};  dc_t = G_t . x_t;  dcache = p_0 G_0
#include "common/cpu/partial.h"
#include "ddl/shift.h"

namespace df::cpu::DF_ISA {
namespace {
template <class E>
inline const E* head(const ShiftHeads& x, int64_t b, int64_t t, int64_t h) {
  return static_cast<const E*>(x.data) + b * x.b + t * x.t + h * x.h;
}

template <class E>
struct Tile {
  using T = Compute<E>;
  const ShiftShape& s;
  const ShiftTile& tile;

  int64_t row(int64_t t, int64_t h) const { return (tile.batch * s.T + t) * s.H + h; }
  int64_t state(int64_t h) const { return (tile.n * s.H + h) * s.D; }
  // x_{t-1}; null is zero
  const E* before(const ShiftHeads& x, const void* cache, int64_t t, int64_t h) const {
    if (t > tile.first) return head<E>(x, tile.batch, t - 1, h);
    return cache ? static_cast<const E*>(cache) + state(h) : nullptr;
  }
};

template <class E>
void fwd(const ShiftFwdArgs& p, const ShiftTile& tile) {
  using T = Compute<E>;
  const Tile<E> at{p.shape, tile};
  for (int64_t t = tile.begin; t < tile.end; ++t)
    for (int64_t h = 0; h < p.shape.H; ++h) {
      const E* const x = head<E>(p.x, tile.batch, t, h);
      const E* const before = at.before(p.x, p.cache, t, h);
      const T previous = *head<T>(p.previous, tile.batch, t, h);
      const T current = *head<T>(p.current, tile.batch, t, h);
      E* const y = static_cast<E*>(p.y) + at.row(t, h) * p.shape.D;
      over_row<T>(p.shape.D, [&](int64_t c, auto part) {
        const Vec<T> old = before ? load_part<T>(before + c, part) : Vec<T>{};
        Vec<T> sum = previous * old;
        sum += current * load_part<T>(x + c, part);
        store_part<T>(sum, y + c, part);
      });
    }
}

// to = a x + b y (+ z): y and z may be null.
template <class T, class E, class O>
void combine(int64_t n, T a, const E* x, T b, const E* y, const T* z, O* to) {
  over_row<T>(n, [&](int64_t c, auto part) {
    Vec<T> sum = x ? a * load_part<T>(x + c, part) : Vec<T>{};
    if (y) sum += b * load_part<T>(y + c, part);
    if (z) sum += load_part<T>(z + c, part);
    store_part<T>(sum, to + c, part);
  });
}

template <class E>
struct Bwd {
  using T = Compute<E>;
  const ShiftBwdArgs& p;
  const ShiftTile& tile;
  Tile<E> at{p.shape, tile};

  void token(int64_t t, int64_t h) {
    const int64_t D = p.shape.D;
    const bool last = t + 1 == tile.last;
    const E* const g = head<E>(p.dy, tile.batch, t, h);
    const E* const next = last ? nullptr : head<E>(p.dy, tile.batch, t + 1, h);
    const T* const d_last =
        last && p.d_last ? static_cast<const T*>(p.d_last) + at.state(h) : nullptr;
    const T current = *head<T>(p.current, tile.batch, t, h);
    const T previous = last ? T(0) : *head<T>(p.previous, tile.batch, t + 1, h);
    combine(D, current, g, previous, next, d_last, static_cast<E*>(p.dx) + at.row(t, h) * D);

    const E* const x = head<E>(p.x, tile.batch, t, h);
    const E* const before = at.before(p.x, p.cache, t, h);
    Vec<T> with_old = {}, with_new = {};
    over_row<T>(D, [&](int64_t c, auto part) {
      const Vec<T> d = load_part<T>(g + c, part);
      if (before) with_old += d * load_part<T>(before + c, part);
      with_new += d * load_part<T>(x + c, part);
    });
    static_cast<T*>(p.d_previous)[at.row(t, h)] = sum<T>(with_old);
    static_cast<T*>(p.d_current)[at.row(t, h)] = sum<T>(with_new);
  }

  void cache(int64_t h) {  // passes d_last on where no token is
    const bool empty = tile.first == tile.last;
    const E* const g = empty ? nullptr : head<E>(p.dy, tile.batch, tile.first, h);
    const T weight = empty ? T(0) : *head<T>(p.previous, tile.batch, tile.first, h);
    const T* const d_last =
        empty && p.d_last ? static_cast<const T*>(p.d_last) + at.state(h) : nullptr;
    T* const to = static_cast<T*>(p.d_cache) + at.state(h);
    combine<T, E, T>(p.shape.D, weight, g, T(0), nullptr, d_last, to);
  }

  void run() {
    for (int64_t t = tile.begin; t < tile.end; ++t)
      for (int64_t h = 0; h < p.shape.H; ++h) token(t, h);
    for (int64_t h = 0; h < p.shape.H && tile.begin == tile.first && p.d_cache; ++h) cache(h);
  }
};
}  // namespace

void shift_fwd(const ShiftFwdArgs& p, const ShiftTile& tile) {
  dispatch(p.x.dtype, [&](auto type) { fwd<typename decltype(type)::type>(p, tile); });
}
void shift_bwd(const ShiftBwdArgs& p, const ShiftTile& tile) {
  dispatch(p.x.dtype, [&](auto type) { Bwd<typename decltype(type)::type>{p, tile}.run(); });
}
}  // namespace df::cpu::DF_ISA
