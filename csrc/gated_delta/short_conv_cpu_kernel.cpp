// Vectors run over channels, which are contiguous. A step makes kRows outputs of one vector from
// kRows + W - 1 inputs, so that an input is loaded and converted (kRows + W - 1) / kRows times
// instead of W times; blocks of channels keep these inputs in the first-level cache. That needs W
// as a constant: W = 4, which models use, is one, and any other width is kAnyWidth, which loads an
// input for each tap (seven widths as constants would take half of the package's build time).
//
// Backward, per tile: dz = dy silu'(z) with z computed again, for the tile and the W - 1 tokens
// after it, goes to scratch; dx is then the convolution of dz with the taps reversed.
#include "common/cpu/math.h"
#include "common/cpu/partial.h"
#include "gated_delta/short_conv.h"

namespace df::cpu::DF_ISA {
namespace {
constexpr int kRows = 4;
constexpr int kAnyWidth = 0, kMaxWidth = 8;
constexpr int64_t kFwdBlock = 1024, kBwdBlock = 256;

template <int W>
inline int width_of(const ConvInputs& in) {
  return W == kAnyWidth ? int(in.W) : W;
}

template <class E>
inline const E* input_row(const ConvInputs& in, int64_t sequence, int64_t t) {
  const Sequence& s = in.sequences[sequence];
  if (t >= 0) return static_cast<const E*>(in.x.data) + in.x.at(s.batch, s.begin + t, 0);
  return static_cast<const E*>(in.history) + sequence * in.history_stride + (t + in.W - 1) * in.D;
}

// The inputs of `rows` outputs in one vector of channels, number i by load(i): in registers, or
// loaded at each use.
template <class T, int W, int rows, class Load>
struct Window {
  Vec<T> x[rows + W - 1];
  explicit Window(Load load) {
#pragma GCC unroll 11
    for (int i = 0; i < rows + W - 1; ++i) x[i] = load(i);
  }
  Vec<T> operator[](int i) const { return x[i]; }
};
template <class T, int rows, class Load>
struct Window<T, kAnyWidth, rows, Load> {
  Load load;
  explicit Window(Load load) : load(load) {}
  Vec<T> operator[](int i) const { return load(i); }
};
template <class T, int W, int rows, class Load>
inline Window<T, W, rows, Load> window(Load load) {
  return Window<T, W, rows, Load>(load);
}

// z[j] += sum_i w_i x[i + j] in one vector of channels; w_i stands at w + i * step.
template <int rows, class T, class X, class Part>
inline void convolve(const X& x, int width, const T* w, int64_t step, Part part, Vec<T>* z) {
#pragma GCC unroll 8
  for (int i = 0; i < width; ++i) {
    const Vec<T> tap = load_part<T>(w + i * step, part);
#pragma GCC unroll 4
    for (int j = 0; j < rows; ++j) z[j] += tap * x[i + j];
  }
}

// Rows of the inputs of `rows` outputs from position t on, at channel c0.
template <class E, int rows>
struct InputRows {
  const E* x[rows + kMaxWidth - 1] = {};
  InputRows(const ConvInputs& in, int width, int64_t sequence, int64_t t, int64_t c0) {
    for (int i = 0; i < rows + width - 1; ++i)
      x[i] = input_row<E>(in, sequence, t - width + 1 + i) + c0;
  }
};

// Outputs of positions [t, t + rows), channels [c0, c0 + n).
template <class E, int W, int rows>
inline void fwd_rows(const ConvFwdArgs& p, int64_t sequence, int64_t t, int64_t c0, int64_t n) {
  using T = Compute<E>;
  const ConvInputs& in = p.in;
  const Sequence& s = in.sequences[sequence];
  const int width = width_of<W>(in);
  const InputRows<E, rows> from(in, width, sequence, t, c0);
  const T* w = static_cast<const T*>(in.weight) + c0;
  const T* bias = static_cast<const T*>(in.bias) + c0;
  E* y = static_cast<E*>(p.y) + (s.batch * p.T + s.begin + t) * in.D + c0;
  over_row<T>(n, [&](int64_t c, auto part) {
    const auto x = window<T, W, rows>([&](int i) { return load_part<T>(from.x[i] + c, part); });
    Vec<T> z[rows];
#pragma GCC unroll 4
    for (int j = 0; j < rows; ++j) z[j] = load_part<T>(bias + c, part);
    convolve<rows>(x, width, w + c, in.D, part, z);
#pragma GCC unroll 4
    for (int j = 0; j < rows; ++j)
      store_part<T>(in.silu ? silu<T>(z[j]) : z[j], y + j * in.D + c, part);
  });
}

template <class E, int W>
void fwd(const ConvFwdArgs& p, const ConvTile& tile) {
  for (int64_t c0 = 0; c0 < p.in.D; c0 += kFwdBlock) {
    const int64_t n = p.in.D - c0 < kFwdBlock ? p.in.D - c0 : kFwdBlock;
    int64_t t = tile.begin;
    for (; t + kRows <= tile.end; t += kRows) fwd_rows<E, W, kRows>(p, tile.sequence, t, c0, n);
    for (; t < tile.end; ++t) fwd_rows<E, W, 1>(p, tile.sequence, t, c0, n);
  }
}

// One tile and block of channels [c0, c0 + n). Row r of dz belongs to position
// tile.begin + r - (W - 1); the first W - 1 rows, and those after the sequence, are zero.
template <class E, int W>
struct Bwd {
  using T = Compute<E>;
  const ConvBwdArgs& p;
  const ConvInputs& in;
  const ConvTile& tile;
  const Sequence& s;
  int width;
  int64_t length, c0, n;
  T *sums, *dz;
  const T *w, *zeros;

  // dz of positions [t, t + rows); those within the tile also count for the taps' gradients
  template <int rows>
  void dz_rows(int64_t t) {
    const InputRows<E, rows> from(in, width, tile.sequence, t, c0);
    const E* dy = static_cast<const E*>(p.dy.data) + p.dy.at(s.batch, s.begin + t, 0) + c0;
    const T* bias = static_cast<const T*>(in.bias) + c0;
    T* to = dz + (t - tile.begin + width - 1) * kBwdBlock;
    over_row<T>(n, [&](int64_t c, auto part) {
      const auto x = window<T, W, rows>([&](int i) { return load_part<T>(from.x[i] + c, part); });
      Vec<T> d[rows];
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) d[j] = load_part<T>(dy + j * p.dy.t + c, part);
      if (in.silu) {
        Vec<T> z[rows];
#pragma GCC unroll 4
        for (int j = 0; j < rows; ++j) z[j] = load_part<T>(bias + c, part);
        convolve<rows>(x, width, w + c, in.D, part, z);
#pragma GCC unroll 4
        for (int j = 0; j < rows; ++j) {
          const Vec<T> sig = sigmoid<T>(z[j]);
          d[j] *= sig * (T(1) + z[j] * (T(1) - sig));
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) store_part<T>(d[j], to + j * kBwdBlock + c, part);
      if (t < tile.end) add_sums<rows>(x, d, c, part);
    });
  }

  template <int rows, class X, class Part>
  void add_sums(const X& x, const Vec<T>* d, int64_t c, Part part) {
    T* to = sums + c0 + c;
#pragma GCC unroll 9
    for (int i = 0; i <= width; ++i, to += in.D) {
      Vec<T> total = load_part<T>(to, part);
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) total += i < width ? d[j] * x[i + j] : d[j];
      store_part<T>(total, to, part);
    }
  }

  // Gradient rows of positions [tile.begin + r, + rows); those before the sequence are the history
  template <int rows>
  void dx_rows(int64_t r) {
    const T* from = dz + (r + width - 1) * kBwdBlock;
    const T* start[rows];  // what the final state passes on
    for (int j = 0; j < rows; ++j) {
      const int64_t state_row = tile.begin + r + j - length + width - 1;
      start[j] = p.d_final && state_row >= 0
                     ? static_cast<const T*>(p.d_final) +
                           (tile.sequence * (width - 1) + state_row) * in.D + c0
                     : zeros;
    }
    const int64_t t = tile.begin + r;
    E* dx = static_cast<E*>(p.dx) + (s.batch * p.T + s.begin + t) * in.D + c0;
    T* dh =
        static_cast<T*>(p.d_initial) + (tile.sequence * (width - 1) + t + width - 1) * in.D + c0;
    over_row<T>(n, [&](int64_t c, auto part) {
      const auto x =
          window<T, W, rows>([&](int i) { return load_part<T>(from + i * kBwdBlock + c, part); });
      Vec<T> d[rows];
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) d[j] = load_part<T>(start[j] + c, part);
      convolve<rows>(x, width, w + (width - 1) * in.D + c, -in.D, part, d);
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j)
        if (t >= 0)
          store_part<T>(d[j], dx + j * in.D + c, part);
        else
          store_part<T>(d[j], dh + j * in.D + c, part);
    });
  }

  void run() {
    int64_t t = tile.begin;
    for (; t + kRows <= tile.end; t += kRows) dz_rows<kRows>(t);
    const int64_t after = tile.end + width - 1, known = after < length ? after : length;
    for (; t < known; ++t) dz_rows<1>(t);
    for (; t < after; ++t)
      __builtin_memset(dz + (t - tile.begin + width - 1) * kBwdBlock, 0, kBwdBlock * sizeof(T));
    if (tile.begin == 0 && p.d_initial)
      for (int64_t r = 1 - width; r < 0; ++r) dx_rows<1>(r);
    int64_t r = 0;
    for (; r + kRows <= tile.end - tile.begin; r += kRows) dx_rows<kRows>(r);
    for (; r < tile.end - tile.begin; ++r) dx_rows<1>(r);
  }
};

template <class E, int W>
void bwd(const ConvBwdArgs& p, const ConvTile& tile, void* sums, void* scratch) {
  using T = Compute<E>;
  const Sequence& s = p.in.sequences[tile.sequence];
  const int width = width_of<W>(p.in);
  T* const dz = static_cast<T*>(scratch);
  T* const zeros = dz + (kConvTile + 2 * (width - 1)) * kBwdBlock;
  for (int64_t c0 = 0; c0 < p.in.D; c0 += kBwdBlock) {
    const int64_t n = p.in.D - c0 < kBwdBlock ? p.in.D - c0 : kBwdBlock;
    Bwd<E, W>{p,
              p.in,
              tile,
              s,
              width,
              s.end - s.begin,
              c0,
              n,
              static_cast<T*>(sums),
              dz,
              static_cast<const T*>(p.in.weight) + c0,
              zeros}
        .run();
  }
}

template <int W>
struct Width {
  static constexpr int value = W;
};
template <class Fn>
void with_width(int64_t W, Fn fn) {
  W == 4 ? fn(Width<4>{}) : fn(Width<kAnyWidth>{});
}
}  // namespace

void short_conv_fwd(const ConvFwdArgs& p, const ConvTile& tile) {
  dispatch(p.in.x.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    with_width(p.in.W, [&](auto width) { fwd<E, decltype(width)::value>(p, tile); });
  });
}

void short_conv_bwd_scratch(const ConvBwdArgs& p, int64_t* bytes) {
  const int64_t element = p.in.x.dtype == DType::f64 ? 8 : 4;
  *bytes = (kConvTile + 2 * (p.in.W - 1) + 1) * kBwdBlock * element;
}

void short_conv_bwd(const ConvBwdArgs& p, const ConvTile& tile, void* sums, void* scratch) {
  dispatch(p.in.x.dtype, [&](auto type) {
    using E = typename decltype(type)::type;
    with_width(p.in.W, [&](auto width) { bwd<E, decltype(width)::value>(p, tile, sums, scratch); });
  });
}
}  // namespace df::cpu::DF_ISA
