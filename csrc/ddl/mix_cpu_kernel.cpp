// Both convolutions are one, depthwise over all C = d d_v channels (vectors run along them):
// a read-out folds the d_v channels of a feature together afterwards, an expansion copies its input
// to d_v channels before. Rows go through scratch in the compute type, and a step makes kRows
// tokens of a block of channels, so that rows, taps and sums stay in the first-level cache.
//
// Backward, at input position t, with the rows g_t, ..., g_{t+K-1} of dy (zeros outside the
// sequence; copied to all channels for a read-out):
//   dx_t = sum_s w_s g_{t+s} (folded for an expansion),   dw_s += g_{t+s} x_t
// so that dy and x are read once. Positions before the sequence are those of the initial state.
#include "common/cpu/partial.h"
#include "common/cpu/transpose.h"
#include "ddl/mix.h"

namespace df::cpu::DF_ISA {
namespace {
constexpr int kRows = 4;
constexpr int kAnyTaps = 0;  // K = 4, which models use, is a constant

// Sums and copies of groups of kCount neighbouring lanes: kCount vectors to one and back.
template <class T>
struct Pairs {
  using I = Vec<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  I even, odd;
  constexpr Pairs() : even{}, odd{} {
    for (int i = 0; i < kLanes<T>; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  }
};
template <class T, int kCount>
inline Vec<T> fold_vectors(const T* from) {
  if constexpr (kCount == 1) {
    return load(from);
  } else {
    const Pairs<T> mask;
    const Vec<T> a = fold_vectors<T, kCount / 2>(from);
    const Vec<T> b = fold_vectors<T, kCount / 2>(from + kCount / 2 * kLanes<T>);
    return __builtin_shuffle(a, b, mask.even) + __builtin_shuffle(a, b, mask.odd);
  }
}
template <class T, int kCount>
inline void spread_vector(Vec<T> x, T* to) {
  if constexpr (kCount == 1) {
    store(to, x);
  } else {
    const detail::Interleave<T> mask;
    spread_vector<T, kCount / 2>(__builtin_shuffle(x, x, mask.low), to);
    spread_vector<T, kCount / 2>(__builtin_shuffle(x, x, mask.high), to + kCount / 2 * kLanes<T>);
  }
}

// to[i] = sum_j from[i][j] for n features; whole vectors, so that rows are padded to them.
template <class T>
void fold(const T* from, int64_t n, int64_t dv, T* to) {
  const auto vectors = [&](auto count) {
    for (int64_t i = 0; i < n; i += kLanes<T>)
      store(to + i, fold_vectors<T, decltype(count)::value>(from + i * count.value));
  };
  switch (dv) {
    case 1: return vectors(std::integral_constant<int, 1>{});
    case 2: return vectors(std::integral_constant<int, 2>{});
    case 4: return vectors(std::integral_constant<int, 4>{});
    case 8: return vectors(std::integral_constant<int, 8>{});
  }
  for (int64_t i = 0; i < n; ++i) {
    T total = from[i * dv];
    for (int64_t j = 1; j < dv; ++j) total += from[i * dv + j];
    to[i] = total;
  }
}
// to[i][j] = from[i]
template <class T>
void spread(const T* from, int64_t n, int64_t dv, T* to) {
  const auto vectors = [&](auto count) {
    for (int64_t i = 0; i < n; i += kLanes<T>)
      spread_vector<T, decltype(count)::value>(load(from + i), to + i * count.value);
  };
  switch (dv) {
    case 1: return vectors(std::integral_constant<int, 1>{});
    case 2: return vectors(std::integral_constant<int, 2>{});
    case 4: return vectors(std::integral_constant<int, 4>{});
    case 8: return vectors(std::integral_constant<int, 8>{});
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < dv; ++j) to[i * dv + j] = from[i];
}

// Copies of row pointers that a loop keeps in registers; for any number of them, where they stand.
template <class P, int kCount>
struct Rows {
  P row[kCount];
  explicit Rows(const P* from) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) row[i] = from[i];
  }
  P operator[](int64_t i) const { return row[i]; }
};
template <class P>
struct Rows<P, kAnyTaps> {
  const P* from;
  explicit Rows(const P* from) : from(from) {}
  P operator[](int64_t i) const { return from[i]; }
};
template <class T, int kTaps, int rows>
using WindowRows = Rows<const T*, kTaps == kAnyTaps ? kAnyTaps : kTaps + rows - 1>;

// z[j] = sum_s w_s x[j + K - 1 - s] for rows of n channels.
template <class T, int kTaps, int rows>
void convolve(const T* const* x_, const T* w, int64_t ld, int64_t taps, int64_t n, T* const* z_) {
  const WindowRows<T, kTaps, rows> x(x_);
  const Rows<T*, rows> z(z_);
  const int64_t K = kTaps == kAnyTaps ? taps : kTaps;
  over_row<T>(n, [&](int64_t c, auto part) {
    Vec<T> sum[rows] = {};
#pragma GCC unroll 4
    for (int64_t s = 0; s < K; ++s) {
      const Vec<T> tap = load_part<T>(w + s * ld + c, part);
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) sum[j] += tap * load_part<T>(x[j + K - 1 - s] + c, part);
    }
#pragma GCC unroll 4
    for (int j = 0; j < rows; ++j) store_part<T>(sum[j], z[j] + c, part);
  });
}

// dx[j] = sum_s w_s g[j + s]; dw_s += sum_j g[j + s] x[j].
template <class T, int kTaps, int rows>
void adjoint(const T* const* g_, const T* const* x_, const T* w, T* dw, int64_t ld, int64_t taps,
             int64_t n, T* const* dx_) {
  const WindowRows<T, kTaps, rows> g(g_);
  const Rows<const T*, rows> x(x_);
  const Rows<T*, rows> dx(dx_);
  const int64_t K = kTaps == kAnyTaps ? taps : kTaps;
  over_row<T>(n, [&](int64_t c, auto part) {
    Vec<T> sum[rows] = {}, in[rows];
#pragma GCC unroll 4
    for (int j = 0; j < rows; ++j) in[j] = load_part<T>(x[j] + c, part);
#pragma GCC unroll 4
    for (int64_t s = 0; s < K; ++s) {
      const Vec<T> tap = load_part<T>(w + s * ld + c, part);
      Vec<T> total = load_part<T>(dw + s * ld + c, part);
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) {
        const Vec<T> d = load_part<T>(g[j + s] + c, part);
        sum[j] += tap * d;
        total += d * in[j];
      }
      store_part<T>(total, dw + s * ld + c, part);
    }
#pragma GCC unroll 4
    for (int j = 0; j < rows; ++j) store_part<T>(sum[j], dx[j] + c, part);
  });
}

// The last rows of a sequence of positions, each made once, in a ring of scratch.
template <class T>
struct Window {
  T* slots;
  const T** ring;
  const T** view;
  int64_t size, origin = 0, next = 0;

  void start(int64_t position) { origin = next = position; }
  // Rows [first, first + count), count <= size; make(position, slot) returns where a row stands.
  template <class Make>
  const T* const* rows(int64_t first, int64_t count, Make make) {
    int64_t slot = (next - origin) % size;
    const auto following = [&] { slot = slot + 1 == size ? 0 : slot + 1; };
    for (; next < first + count; ++next, following())
      ring[slot] = make(next, slots + slot * kMixChannels);
    slot = (first - origin) % size;
    for (int64_t i = 0; i < count; ++i, following()) view[i] = ring[slot];
    return view;
  }
};

template <class T>
struct Scratch {  // the rows of a task: a window, kRows inputs and outputs, one narrow row, zeros
  Window<T> window;
  T *in, *out, *narrow;
  const T* zeros;
  static int64_t bytes(int64_t K) {
    return (K - 1 + 3 * kRows + 2) * kMixChannels * int64_t(sizeof(T)) +
           2 * (K - 1 + kRows) * int64_t(sizeof(T*));
  }
  Scratch(void* at, int64_t K) {
    const int64_t size = K - 1 + kRows;
    T* const slots = static_cast<T*>(at);
    in = slots + size * kMixChannels;
    out = in + kRows * kMixChannels;
    narrow = out + kRows * kMixChannels;
    T* const end = narrow + 2 * kMixChannels;
    zeros = end - kMixChannels;
    const T** const pointers = reinterpret_cast<const T**>(end);
    window = {slots, pointers, pointers + size, size};
  }
};

// A block of features [f0, f0 + n) of a tile, and its rows in the compute type.
template <class E>
struct Block {
  using T = Compute<E>;
  const MixShape& s;
  const MixTile& tile;
  Scratch<T>& scratch;
  int64_t f0, n;

  int64_t wide() const { return n * s.dv; }
  // Elements of position t in `rows` of x, dx (channels()) or y, dy.
  const E* at(const MixRows& rows, int64_t t, bool is_wide) const {
    return static_cast<const E*>(rows.data) + tile.batch * rows.b + (tile.first + t) * rows.t +
           (is_wide ? f0 * s.dv : f0);
  }
  E* at(void* rows, int64_t t, bool is_wide) const {
    const int64_t row = tile.batch * s.T + tile.first + t;
    return static_cast<E*>(rows) + (is_wide ? (row * s.d + f0) * s.dv : row * s.d + f0);
  }
  // A state's slot: element c of the block at state(...)[c * (K - 1)].
  int64_t state(int64_t slot) const {
    return (tile.n * s.in() + (s.expand ? f0 : f0 * s.dv)) * (s.K - 1) + slot;
  }

  // The row `from`, narrow or wide, as a wide one; in place if nothing has to be done.
  const T* widened(const E* from, bool is_wide, T* to) const {
    if constexpr (sizeof(E) == sizeof(T))
      if (is_wide || s.dv == 1) return from;
    if (is_wide || s.dv == 1) return load_row(from, to, is_wide ? wide() : n), to;
    load_row(from, scratch.narrow, n);
    return spread(scratch.narrow, n, s.dv, to), to;
  }
  // Input of position t, from the initial state where it is before the sequence.
  const T* input(const MixRows& x, const void* initial, int64_t t, T* to) const {
    if (t >= 0) return widened(at(x, t, !s.expand), !s.expand, to);
    if (!initial) return scratch.zeros;
    const E* const from = static_cast<const E*>(initial) + state(t + s.K - 1);
    T* const row = s.expand && s.dv > 1 ? scratch.narrow : to;
    for (int64_t c = 0; c < (s.expand ? n : wide()); ++c) row[c] = to_compute(from[c * (s.K - 1)]);
    if (row != to) spread(row, n, s.dv, to);
    return to;
  }
};

template <class E, int kTaps>
void fwd(const MixFwdArgs& p, const MixTile& tile, int64_t f0, void* memory) {
  using T = Compute<E>;
  const MixShape& s = p.shape;
  const int64_t n = s.d - f0 < mix_block(s) ? s.d - f0 : mix_block(s), ld = s.channels();
  Scratch<T> scratch(memory, s.K);
  const Block<E> block{s, tile, scratch, f0, n};
  const T* const w = static_cast<const T*>(p.w) + f0 * s.dv;
  const auto make = [&](int64_t t, T* slot) { return block.input(p.x, p.initial, t, slot); };
  const bool folds = !s.expand && s.dv > 1;

  const auto step = [&](int64_t t, auto rows) {
    constexpr int count = decltype(rows)::value;
    const T* const* x = scratch.window.rows(t - s.K + 1, count + s.K - 1, make);
    T* out[count];
    for (int j = 0; j < count; ++j) {
      out[j] = scratch.out + j * kMixChannels;
      if constexpr (sizeof(E) == sizeof(T))
        if (!folds) out[j] = block.at(p.y, t + j, s.expand);
    }
    convolve<T, kTaps, count>(x, w, ld, s.K, block.wide(), out);
    for (int j = 0; j < count; ++j) {
      E* const y = block.at(p.y, t + j, s.expand);
      if (folds) {
        fold(out[j], n, s.dv, scratch.narrow);
        store_row(scratch.narrow, y, n);
      } else if (static_cast<void*>(out[j]) != y) {
        store_row(out[j], y, block.wide());
      }
    }
  };
  scratch.window.start(tile.begin - s.K + 1);
  int64_t t = tile.begin;
  for (; t + kRows <= tile.end; t += kRows) step(t, std::integral_constant<int, kRows>{});
  for (; t < tile.end; ++t) step(t, std::integral_constant<int, 1>{});
}

template <class E, int kTaps>
struct Bwd {
  using T = Compute<E>;
  const MixBwdArgs& p;
  const MixShape& s;
  const MixTile& tile;
  Scratch<T> scratch;
  Block<E> block;
  const T* w;
  T* dw;
  int64_t length;

  Bwd(const MixBwdArgs& p, const MixTile& tile, int64_t f0, void* sums, void* memory)
      : p(p),
        s(p.shape),
        tile(tile),
        scratch(memory, s.K),
        block{s, tile, scratch, f0, s.d - f0 < mix_block(s) ? s.d - f0 : mix_block(s)},
        w(static_cast<const T*>(p.w) + f0 * s.dv),
        dw(static_cast<T*>(sums) + f0 * s.dv),
        length(tile.last - tile.first) {}

  // The gradient of position t: that of its row, and what the final state passes on.
  void put(T* wide, int64_t t) {
    const bool folds = s.expand && s.dv > 1;
    T* const row = folds ? scratch.narrow : wide;
    if (folds) fold(wide, block.n, s.dv, row);
    const int64_t n = s.expand ? block.n : block.wide(), slot = t - length + s.K - 1;
    if (p.d_final && slot >= 0) {
      const T* const from = static_cast<const T*>(p.d_final) + block.state(slot);
      for (int64_t c = 0; c < n; ++c) row[c] += from[c * (s.K - 1)];
    }
    if (t >= 0) return store_row(row, block.at(p.dx, t, !s.expand), n);
    T* const to = static_cast<T*>(p.d_initial) + block.state(t + s.K - 1);
    for (int64_t c = 0; c < n; ++c) to[c * (s.K - 1)] = row[c];
  }

  template <int rows>
  void step(int64_t t) {
    const T* const* g = scratch.window.rows(t, rows + s.K - 1, [&](int64_t at, T* slot) {
      if (at < 0 || at >= length) return scratch.zeros;
      return block.widened(block.at(p.dy, at, s.expand), s.expand, slot);
    });
    const bool straight = sizeof(E) == sizeof(T) && (!s.expand || s.dv == 1) && t >= 0 &&
                          !(p.d_final && t + rows > length - s.K + 1);
    const T* x[rows];
    T* dx[rows];
    for (int j = 0; j < rows; ++j) {
      x[j] = block.input(p.x, p.initial, t + j, scratch.in + j * kMixChannels);
      dx[j] = scratch.out + j * kMixChannels;
      if constexpr (sizeof(E) == sizeof(T))
        if (straight) dx[j] = block.at(p.dx, t + j, !s.expand);
    }
    adjoint<T, kTaps, rows>(g, x, w, dw, s.channels(), s.K, block.wide(), dx);
    for (int j = 0; j < rows && !straight; ++j) put(dx[j], t + j);
  }

  void run() {
    const bool first = tile.begin == 0 && p.initial;
    int64_t t = first ? 1 - s.K : tile.begin;
    scratch.window.start(t);
    for (; t < tile.begin; ++t) step<1>(t);
    for (; t + kRows <= tile.end; t += kRows) step<kRows>(t);
    for (; t < tile.end; ++t) step<1>(t);
  }
};

template <class Fn>
void with_taps(int64_t K, Fn fn) {
  K == 4 ? fn(std::integral_constant<int, 4>{}) : fn(std::integral_constant<int, kAnyTaps>{});
}
}  // namespace

void mix_scratch(const MixShape& s, DType dtype, int64_t* bytes) {
  *bytes = dtype == DType::f64 ? Scratch<double>::bytes(s.K) : Scratch<float>::bytes(s.K);
}

void mix_fwd(const MixFwdArgs& p, const MixTile& tile, int64_t f0, void* scratch) {
  dispatch(p.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    with_taps(p.shape.K, [&](auto taps) { fwd<E, decltype(taps)::value>(p, tile, f0, scratch); });
  });
}

void mix_bwd(const MixBwdArgs& p, const MixTile& tile, int64_t f0, void* sums, void* scratch) {
  dispatch(p.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    with_taps(p.shape.K,
              [&](auto taps) { Bwd<E, decltype(taps)::value>(p, tile, f0, sums, scratch).run(); });
  });
}
}  // namespace df::cpu::DF_ISA
