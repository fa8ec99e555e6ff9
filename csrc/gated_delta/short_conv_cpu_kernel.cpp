// Vectors run over channels, which are contiguous. A step makes kRows outputs of one vector from
// kRows + W - 1 inputs, so that an input is loaded and converted (kRows + W - 1) / kRows times
// instead of W times; blocks of channels keep these inputs in the first-level cache.
//
// Backward, per tile: dz = dy silu'(z) with z computed again, for the tile and the W - 1 tokens
// after it, goes to scratch; dx is then the convolution of dz with the taps reversed.
#include "common/cpu/math.h"
#include "gated_delta/partial.h"
#include "gated_delta/short_conv.h"

namespace df::cpu::DF_ISA {
namespace {
constexpr int kRows = 4;
constexpr int64_t kFwdBlock = 1024, kBwdBlock = 256;

template <class E>
inline const E* input_row(const ConvInputs& in, int64_t sequence, int64_t t) {
  const Sequence& s = in.sequences[sequence];
  if (t >= 0) return static_cast<const E*>(in.x.data) + in.x.at(s.batch, s.begin + t, 0);
  return static_cast<const E*>(in.history) + sequence * in.history_stride + (t + in.W - 1) * in.D;
}

// z[j] += sum_i w_i x[i + j] in one vector of channels; w_i stands at w + i * step.
template <int W, int rows, class T, class Part>
inline void convolve(const Vec<T>* x, const T* w, int64_t step, Part part, Vec<T>* z) {
#pragma GCC unroll 8
  for (int i = 0; i < W; ++i) {
    const Vec<T> tap = load_part<T>(w + i * step, part);
#pragma GCC unroll 4
    for (int j = 0; j < rows; ++j) z[j] += tap * x[i + j];
  }
}

// Outputs of positions [t, t + rows), channels [c0, c0 + n).
template <class E, int W, int rows>
inline void fwd_rows(const ConvFwdArgs& p, int64_t sequence, int64_t t, int64_t c0, int64_t n) {
  using T = Compute<E>;
  const ConvInputs& in = p.in;
  const Sequence& s = in.sequences[sequence];
  const E* x[rows + W - 1];
  for (int i = 0; i < rows + W - 1; ++i) x[i] = input_row<E>(in, sequence, t - W + 1 + i) + c0;
  const T* w = static_cast<const T*>(in.weight) + c0;
  const T* bias = static_cast<const T*>(in.bias) + c0;
  E* y = static_cast<E*>(p.y) + (s.batch * p.T + s.begin + t) * in.D + c0;
  over_row<T>(n, [&](int64_t c, auto part) {
    Vec<T> xs[rows + W - 1], z[rows];
#pragma GCC unroll 11
    for (int i = 0; i < rows + W - 1; ++i) xs[i] = load_part<T>(x[i] + c, part);
#pragma GCC unroll 4
    for (int j = 0; j < rows; ++j) z[j] = load_part<T>(bias + c, part);
    convolve<W, rows>(xs, w + c, in.D, part, z);
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
  static constexpr int64_t kDzRows = kConvTile + 2 * (W - 1);
  const ConvBwdArgs& p;
  const ConvInputs& in;
  const ConvTile& tile;
  const Sequence& s;
  int64_t length, c0, n;
  T *sums, *dz;
  const T *w, *zeros;

  // dz of positions [t, t + rows); those within the tile also count for the taps' gradients
  template <int rows, bool count>
  void dz_rows(int64_t t) {
    const E* x[rows + W - 1];
    for (int i = 0; i < rows + W - 1; ++i)
      x[i] = input_row<E>(in, tile.sequence, t - W + 1 + i) + c0;
    const E* dy = static_cast<const E*>(p.dy.data) + p.dy.at(s.batch, s.begin + t, 0) + c0;
    const T* bias = static_cast<const T*>(in.bias) + c0;
    T* to = dz + (t - tile.begin + W - 1) * kBwdBlock;
    over_row<T>(n, [&](int64_t c, auto part) {
      Vec<T> xs[rows + W - 1], d[rows];
#pragma GCC unroll 11
      for (int i = 0; i < rows + W - 1; ++i) xs[i] = load_part<T>(x[i] + c, part);
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) d[j] = load_part<T>(dy + j * p.dy.t + c, part);
      if (in.silu) {
        Vec<T> z[rows];
#pragma GCC unroll 4
        for (int j = 0; j < rows; ++j) z[j] = load_part<T>(bias + c, part);
        convolve<W, rows>(xs, w + c, in.D, part, z);
#pragma GCC unroll 4
        for (int j = 0; j < rows; ++j) {
          const Vec<T> sig = sigmoid<T>(z[j]);
          d[j] *= sig * (T(1) + z[j] * (T(1) - sig));
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) store_part<T>(d[j], to + j * kBwdBlock + c, part);
      if constexpr (count) add_sums<rows>(xs, d, c, part);
    });
  }

  template <int rows, class Part>
  void add_sums(const Vec<T>* xs, const Vec<T>* d, int64_t c, Part part) {
    T* to = sums + c0 + c;
#pragma GCC unroll 9
    for (int i = 0; i <= W; ++i, to += in.D) {
      Vec<T> total = load_part<T>(to, part);
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) total += i < W ? d[j] * xs[i + j] : d[j];
      store_part<T>(total, to, part);
    }
  }

  // Gradient rows of positions [tile.begin + r, + rows); those before the sequence are the history
  template <int rows>
  void dx_rows(int64_t r) {
    const T* from = dz + (r + W - 1) * kBwdBlock;
    const T* start[rows];  // what the final state passes on
    for (int j = 0; j < rows; ++j) {
      const int64_t state_row = tile.begin + r + j - length + W - 1;
      start[j] = p.d_final && state_row >= 0 ? static_cast<const T*>(p.d_final) +
                                                   (tile.sequence * (W - 1) + state_row) * in.D + c0
                                             : zeros;
    }
    const int64_t t = tile.begin + r;
    E* dx = static_cast<E*>(p.dx) + (s.batch * p.T + s.begin + t) * in.D + c0;
    T* dh = static_cast<T*>(p.d_initial) + (tile.sequence * (W - 1) + t + W - 1) * in.D + c0;
    over_row<T>(n, [&](int64_t c, auto part) {
      Vec<T> rows_of_dz[rows + W - 1], d[rows];
#pragma GCC unroll 11
      for (int i = 0; i < rows + W - 1; ++i)
        rows_of_dz[i] = load_part<T>(from + i * kBwdBlock + c, part);
#pragma GCC unroll 4
      for (int j = 0; j < rows; ++j) d[j] = load_part<T>(start[j] + c, part);
      convolve<W, rows>(rows_of_dz, w + (W - 1) * in.D + c, -in.D, part, d);
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
    for (; t + kRows <= tile.end; t += kRows) dz_rows<kRows, true>(t);
    for (; t < tile.end; ++t) dz_rows<1, true>(t);
    const int64_t after = tile.end + W - 1, known = after < length ? after : length;
    for (; t < known; ++t) dz_rows<1, false>(t);
    for (; t < after; ++t)
      __builtin_memset(dz + (t - tile.begin + W - 1) * kBwdBlock, 0, kBwdBlock * sizeof(T));
    if (tile.begin == 0 && p.d_initial)
      for (int64_t r = 1 - W; r < 0; ++r) dx_rows<1>(r);
    int64_t r = 0;
    for (; r + kRows <= tile.end - tile.begin; r += kRows) dx_rows<kRows>(r);
    for (; r < tile.end - tile.begin; ++r) dx_rows<1>(r);
  }
};

template <class E, int W>
void bwd(const ConvBwdArgs& p, const ConvTile& tile, void* sums, void* scratch) {
  using T = Compute<E>;
  const Sequence& s = p.in.sequences[tile.sequence];
  T* dz = static_cast<T*>(scratch);
  for (int64_t c0 = 0; c0 < p.in.D; c0 += kBwdBlock) {
    const int64_t n = p.in.D - c0 < kBwdBlock ? p.in.D - c0 : kBwdBlock;
    Bwd<E, W>{p,
              p.in,
              tile,
              s,
              s.end - s.begin,
              c0,
              n,
              static_cast<T*>(sums),
              dz,
              static_cast<const T*>(p.in.weight) + c0,
              dz + Bwd<E, W>::kDzRows * kBwdBlock}
        .run();
  }
}

template <int W>
struct Width {
  static constexpr int value = W;
};
template <class Fn>
void with_width(int64_t W, Fn fn) {
  switch (W) {
    case 2: return fn(Width<2>{});
    case 3: return fn(Width<3>{});
    case 4: return fn(Width<4>{});
    case 5: return fn(Width<5>{});
    case 6: return fn(Width<6>{});
    case 7: return fn(Width<7>{});
    case 8: return fn(Width<8>{});
  }
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
