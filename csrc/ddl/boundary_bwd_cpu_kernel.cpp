// Backward of the boundary, one token after the other, from Y: with G the gradient of Y and
// dx that of the read-out,
//   G^_ij = G_ij + dx_i R_ij,  g_j = sum_i k_i G^_ij,  u = beta v - beta_erase p
//   dX = G^ - beta_erase k g^T,  dk = G^ u - beta_erase (Y g - k (u.g)),  dk~ = s (dk - k (k.dk))
#include "ddl/boundary_rows.h"

namespace df::cpu::DF_ISA {
namespace {
template <class T>
T dot(const T* a, const T* b, int64_t n) {
  T sum = 0;
  for (int64_t j = 0; j < n; ++j) sum += a[j] * b[j];
  return sum;
}
template <class T>
void add(T* to, Vec<T> x) {
  store(to, load(to) + x);
}

template <class T, int kDv>
class Backward {
  using L = Lanes<T, kDv>;

 public:
  Backward(const BoundaryCpu& call, const BoundaryGrads& grads, T* sums, T* scratch)
      : call_(call),
        p_(call.args),
        grads_(grads),
        at_(call),
        sums_(sums),
        lanes_(p_.d_v),
        row_(p_.d * p_.d_v),
        padded_row_(call.padded * p_.d_v) {
    T** const rows[] = {&y_, &G_, &dX_};
    for (T** row : rows) *row = scratch, scratch += padded_row_;
    T** const narrow[] = {&k_, &x_, &dx_, &dc_, &dk_};
    for (T** row : narrow) *row = scratch, scratch += call.padded;
  }

  void token(int64_t n) {
    const T* saved = static_cast<const T*>(p_.saved) + n * (p_.d_v + 2);
    const T* y = read_row(p_.x, p_.state, n, row_, padded_row_, y_);
    if (call_.read_out) behind(n, y, saved[1]);
    const T* G = read_row_or_zeros(grads_.d_y, p_.state, n, row_, padded_row_, G_);
    if (p_.k.data) {
      rewrite(n, y, G, saved);
    } else {
      T* dX = row_to_write(grads_.dx, p_.state, n, row_, padded_row_, dX_);
      state_gradient(y, G, dX, [](int64_t, int, Vec<T>) {});
      write_row(dX, grads_.dx, p_.state, n, row_);
    }
  }

 private:
  // dx_, and the weights behind the read-out.
  void behind(int64_t n, const T* y, T rho) {
    const T *W_v = static_cast<const T*>(p_.W_v.data), *W_beta = weight(p_.W_beta);
    read_out(lanes_, y, weight(p_.read), call_.padded, x_);
    const T* d_c = read_row_or_zeros(grads_.d_c, p_.act, n, p_.d, call_.padded, dc_);
    const T* d_x = read_row_or_zeros(grads_.d_x_in, p_.act, n, p_.d, call_.padded, dx_);
    T dz_v[kMaxChannels] = {};
    const T dz_beta = grads_.d_z_beta.data ? number_at<T>(grads_.d_z_beta, n) : 0;
    if (grads_.d_z_v.data)
      for (int j = 0; j < p_.d_v; ++j) dz_v[j] = number_at<T>(grads_.d_z_v, n, j);
    Vec<T> along{};
    for (int64_t i = 0; i < call_.padded; i += kLanes<T>) {
      Vec<T> from_v{}, dc = load(d_c + i);
      if (W_v)
        for (int j = 0; j < lanes_.count(); ++j)
          from_v += load(W_v + j * call_.padded + i) * dz_v[j];
      if (W_beta) dc += load(W_beta + i) * dz_beta;
      if (p_.v_from_context) dc += from_v;
      const Vec<T> rest = load(d_x + i);
      store(dx_ + i, p_.v_from_context ? rest : rest + from_v);
      store(dc_ + i, dc);
      along += dc * gamma(i) * load(x_ + i);
    }
    if (grads_.norm) norm(rho, sum<T>(along) / T(p_.d), dz_v, dz_beta);
    T* sums = sums_;
    for (int j = 0; j < p_.d_v; ++j) sums[at_.b_v + j] += dz_v[j];
    sums[at_.b_beta] += dz_beta;
  }

  // dx += rho m - rho^3 mean(m x) x with m = gamma dc.
  void norm(T rho, T mean, const T* dz_v, T dz_beta) {
    for (int64_t i = 0; i < call_.padded; i += kLanes<T>) {
      const Vec<T> x = load(x_ + i), dc = load(dc_ + i), unit = x * rho;
      add<T>(dx_ + i, (dc * gamma(i) - unit * (rho * mean)) * rho);
      add<T>(sums_ + at_.norm + i, dc * unit);
      const Vec<T> c = unit * gamma(i);
      if (p_.W_beta.data) add<T>(sums_ + at_.W_beta + i, c * dz_beta);
      if (!p_.W_v.data) continue;
      const Vec<T> source = p_.v_from_context ? c : x;
      for (int j = 0; j < lanes_.count(); ++j)
        add<T>(sums_ + at_.W_v + j * call_.padded + i, source * dz_v[j]);
    }
  }
  Vec<T> gamma(int64_t i) const { return p_.norm.data ? load(weight(p_.norm) + i) : splat(T(1)); }

  // G^ into `out`; fn(first feature, q, G^) for its vectors.
  template <class Fn>
  void state_gradient(const T* y, const T* G, T* out, Fn fn) {
    const T* read = weight(p_.read);
    const T mean = T(1) / T(lanes_.count());
    over_features(lanes_, call_.padded, [&](int64_t i, int64_t e) {
      const Vec<T> dx = call_.read_out ? load(dx_ + i) : Vec<T>{};
      for (int q = 0; q < lanes_.count(); ++q) {
        const int64_t at = e + q * kLanes<T>;
        Vec<T> x = load(G + at);
        if (call_.read_out) {
          const Vec<T> spread = lanes_.spread(dx, q);
          x += read ? Vec<T>(spread * load(read + at)) : Vec<T>(spread * mean);
          if (read) add<T>(sums_ + at_.read + at, spread * load(y + at));
        }
        store(out + at, x);
        fn(i, q, x);
      }
    });
  }

  void rewrite(int64_t n, const T* y, const T* G, const T* saved) {
    const T s = saved[0], *p = saved + 2;
    const Gates<T> gates(p_, n);
    T u[kMaxChannels], g[kMaxChannels] = {}, erased[kMaxChannels];
    gates.update(p, p_.d_v, u);
    const T* raw = read_row(p_.k, p_.act, n, p_.d, call_.padded, k_);
    for (int64_t i = 0; i < call_.padded; i += kLanes<T>) store(k_ + i, load(raw + i) * s);
    Vec<T> products[L::kMax] = {};
    state_gradient(y, G, G_, [&](int64_t i, int q, Vec<T> x) {
      products[q] += lanes_.spread(load(k_ + i), q) * x;
    });
    lanes_.channel_sums(products, g);
    gate_gradients(n, gates, p, g);
    for (int j = 0; j < p_.d_v; ++j) erased[j] = gates.erase * g[j];
    const T ug = dot(u, erased, p_.d_v);
    const T h = p_.normalize_k ? dot(g, u, p_.d_v) - dot(p, erased, p_.d_v) : 0;
    T* dX = row_to_write(grads_.dx, p_.state, n, row_, padded_row_, dX_);
    T* dk = row_to_write(grads_.dk, p_.act, n, p_.d, call_.padded, dk_);
    const Periodic<T, kDv> along_u(lanes_, u), along_g(lanes_, erased);
    over_features(lanes_, call_.padded, [&](int64_t i, int64_t e) {
      Vec<T> each[L::kMax];
      const Vec<T> k = load(k_ + i);
      for (int q = 0; q < lanes_.count(); ++q) {
        const int64_t at = e + q * kLanes<T>;
        const Vec<T> x = load(G_ + at);
        each[q] = x * along_u[q] - load(y + at) * along_g[q];
        store(dX + at, x - lanes_.spread(k, q) * along_g[q]);
      }
      const Vec<T> d = lanes_.fold(each) + k * (ug - h);
      store(dk + i, p_.normalize_k ? d * s : d);
    });
    write_row(dX, grads_.dx, p_.state, n, row_);
    write_row(dk, grads_.dk, p_.act, n, p_.d);
  }

  // Of v and beta as they were given: the logits where they were logits.
  void gate_gradients(int64_t n, const Gates<T>& gates, const T* p, const T* g) {
    T* dv = static_cast<T*>(grads_.dv) + n * p_.d_v;
    T dbeta = 0, derase = 0;
    for (int j = 0; j < p_.d_v; ++j) {
      dv[j] = gates.beta * g[j];
      if (p_.v_logits) dv[j] *= gates.v[j] * (1 - gates.v[j] / T(p_.v_scale));
      dbeta += g[j] * (p_.beta_erase.data ? gates.v[j] : gates.v[j] - p[j]);
      derase -= g[j] * p[j];
    }
    if (p_.beta_logits) dbeta *= gates.beta * (1 - gates.beta / 2);
    static_cast<T*>(grads_.dbeta)[n] = dbeta;
    if (p_.beta_erase.data) static_cast<T*>(grads_.dbeta_erase)[n] = derase;
  }

  static const T* weight(const Weight& w) { return static_cast<const T*>(w.data); }

  const BoundaryCpu& call_;
  const BoundaryArgs& p_;
  const BoundaryGrads& grads_;
  const PaddedSums at_;
  T* const sums_;
  const L lanes_;
  const int64_t row_, padded_row_;
  T *y_, *G_, *dX_, *k_, *x_, *dx_, *dc_, *dk_;
};
}  // namespace

void boundary_bwd(const BoundaryCpu& call, const BoundaryGrads& grads, bool wide, int64_t first,
                  int64_t last, void* sums, void* scratch) {
  with_types(wide, call.args.d_v, [&](auto zero, auto channels) {
    using T = decltype(zero);
    Backward<T, decltype(channels)::value> backward(call, grads, static_cast<T*>(sums),
                                                    static_cast<T*>(scratch));
    for (int64_t n = first; n < last; ++n) backward.token(n);
  });
}
}  // namespace df::cpu::DF_ISA
