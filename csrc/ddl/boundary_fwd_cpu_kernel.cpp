// Forward of the boundary, one token after the other. Its row of X comes from memory once; the
// passes over it (sums, rewrite, read-out, norm and projections) find it in the cache.
#include "ddl/boundary_rows.h"

namespace df::cpu::DF_ISA {
namespace {
template <class E, int kDv>
class Forward {
  using T = Compute<E>;
  using L = Lanes<T, kDv>;

 public:
  Forward(const BoundaryCpu& call, T* scratch)
      : call_(call),
        p_(call.args),
        lanes_(p_.d_v),
        read_out_{lanes_, static_cast<const T*>(p_.read.data)},
        row_(p_.d * p_.d_v),
        padded_row_(call.padded * p_.d_v),
        stream_(call.stream && row_ == padded_row_) {
    direction_ = scratch;
    x_ = direction_ + call.padded;
    c_ = x_ + call.padded;
    state_ = c_ + call.padded;
    y_ = reinterpret_cast<E*>(state_ + padded_row_);
  }

  void token(int64_t n) {
    const T* x = read_row(p_.x, p_.state, n, row_, padded_row_, state_);
    T s = 0, rho = 0, p[kMaxChannels] = {}, squares = 0;
    if (p_.k.data) {
      squares = rewrite(n, x, &s, p);
    } else {
      squares = read_out_.row(x, call_.padded, x_);
    }
    if (call_.read_out) rho = behind(n, squares);
    if (!p_.saved) return;
    T* saved = static_cast<T*>(p_.saved) + n * (p_.d_v + 2);
    saved[0] = s, saved[1] = rho;
    for (int j = 0; j < p_.d_v; ++j) saved[2 + j] = p[j];
  }

 private:
  // Y, and of Y as it is stored the read-out in x_; returns its sum x^2. The row's s and p.
  T rewrite(int64_t n, const T* x, T* s, T* p) {
    const T* k = read_row(p_.k, p_.act, n, p_.d, call_.padded, direction_);
    k = measure(k, x, s, p);
    T u[kMaxChannels];
    Gates<T>(p_, n).update(p, p_.d_v, u);
    E* y = begin_state_row(p_.y, n, row_, padded_row_, y_);
    const Periodic<T, kDv> along(lanes_, u);
    Vec<T> squares{};
    over_features(lanes_, call_.padded, [&](int64_t i, int64_t e) {
      const Vec<T> k_i = load(k + i);
      Vec<T> each[L::kMax];
      for (int q = 0; q < lanes_.count(); ++q) {
        const int64_t at = e + q * kLanes<T>;
        const Vec<T> exact = load(x + at) + lanes_.spread(k_i, q) * along[q];
        each[q] = put(exact, y + at, stream_);
        if (call_.read_out) each[q] = read_out_.weighted(each[q], at);
      }
      if (!call_.read_out) return;
      const Vec<T> sums = read_out_.fold(each);
      store(x_ + i, sums);
      squares += sums * sums;
    });
    end_state_row(y, p_.y, n, row_);
    return sum<T>(squares);
  }

  // k in direction_; s and p = k^T x of the row.
  const T* measure(const T* raw, const T* x, T* s, T* p) {
    constexpr double kLeast = sizeof(T) == 8 ? 1e-290 : 1e-30;
    const double eps2 = p_.k_eps * p_.k_eps;
    double square = sums(raw, x, p), size = 1;
    double inverse = 1;
    if (p_.normalize_k) {
      inverse = 1 / __builtin_sqrt(square + eps2);
      if (!(square + eps2 >= kLeast && square <= kLargest)) {
        size = scale(raw);
        square = sums(direction_, x, p);
        const double eps = p_.k_eps / size;
        inverse = square + eps * eps > 0 ? 1 / __builtin_sqrt(square + eps * eps) : 0;
        raw = direction_;
      }
    }
    for (int j = 0; j < p_.d_v; ++j) p[j] = T(inverse * p[j]);
    *s = T(inverse / size);
    for (int64_t i = 0; i < call_.padded; i += kLanes<T>)
      store(direction_ + i, load(raw + i) * T(inverse));
    return direction_;
  }

  // sum k^2; p = k^T x.
  T sums(const T* k, const T* x, T* p) {
    Vec<T> squares{}, products[L::kMax] = {};
    over_features(lanes_, call_.padded, [&](int64_t i, int64_t e) {
      const Vec<T> k_i = load(k + i);
      squares += k_i * k_i;
      for (int q = 0; q < lanes_.count(); ++q)
        products[q] += lanes_.spread(k_i, q) * load(x + e + q * kLanes<T>);
    });
    lanes_.channel_sums(products, p);
    return sum<T>(squares);
  }

  // Divides the row by a power of two near its largest magnitude (for a zero row: by k_eps), so
  // that squares neither overflow nor vanish.
  double scale(const T* raw) {
    double size = 0;
    for (int64_t i = 0; i < p_.d; ++i) size = __builtin_fmax(size, __builtin_fabs(raw[i]));
    size = __builtin_fmax(size, p_.k_eps);
    size = size > 0 && size <= kLargest ? __builtin_scalbn(1, __builtin_ilogb(size)) : 1;
    for (int64_t i = 0; i < call_.padded; ++i) direction_[i] = T(raw[i] / size);
    return size;
  }

  // Norm and projections of the read-out in x_; rho.
  T behind(int64_t n, double squares) {
    if (p_.x_in) write_row(x_, p_.x_in, p_.act, n, p_.d);
    const T rho = T(1 / __builtin_sqrt(squares / double(p_.d) + p_.norm_eps));
    if (!p_.c && !p_.z_v && !p_.z_beta) return rho;
    Vec<T> z_v[L::kMax] = {}, z_beta{};
    const T *norm = static_cast<const T*>(p_.norm.data), *W_v = static_cast<const T*>(p_.W_v.data),
            *W_beta = static_cast<const T*>(p_.W_beta.data);
    for (int64_t i = 0; i < call_.padded; i += kLanes<T>) {
      const Vec<T> x = load(x_ + i);
      Vec<T> c = x * rho;
      if (norm) c *= load(norm + i);
      store(c_ + i, c);
      if (W_beta) z_beta += load(W_beta + i) * c;
      if (!W_v) continue;
      const Vec<T> source = p_.v_from_context ? c : x;
      for (int j = 0; j < lanes_.count(); ++j) z_v[j] += load(W_v + j * call_.padded + i) * source;
    }
    if (p_.c) write_row(c_, p_.c, p_.act, n, p_.d);
    if (W_beta) static_cast<T*>(p_.z_beta)[n] = sum<T>(z_beta) + bias(p_.b_beta, 0);
    if (W_v)
      for (int j = 0; j < p_.d_v; ++j)
        static_cast<T*>(p_.z_v)[n * p_.d_v + j] = sum<T>(z_v[j]) + bias(p_.b_v, j);
    return rho;
  }
  static T bias(const Weight& b, int j) { return b.data ? static_cast<const T*>(b.data)[j] : 0; }

  static constexpr double kLargest = sizeof(T) == 8 ? 1.7e308 : 3.4e38;
  const BoundaryCpu& call_;
  const BoundaryArgs& p_;
  const L lanes_;
  const ReadOut<T, kDv> read_out_;
  const int64_t row_, padded_row_;
  const bool stream_;
  T *direction_, *x_, *c_, *state_;
  E* y_;
};
}  // namespace

void boundary_fwd(const BoundaryCpu& call, int64_t first, int64_t last, void* scratch) {
  with_types(call.args.state, call.args.d_v, [&](auto type, auto channels) {
    using E = typename decltype(type)::type;
    Forward<E, decltype(channels)::value> forward(call, static_cast<Compute<E>*>(scratch));
    for (int64_t n = first; n < last; ++n) forward.token(n);
  });
  if (call.stream) stream_end();
}
}  // namespace df::cpu::DF_ISA
