// Backward of the rotation on tiles of tokens, by the equations of frame.h. Rows go through tile
// products (C = X W, E = G W, dX = G + change W^T, P += U G + V X); what belongs to planes and
// pairs of planes through vectors over tokens.
#include "grape/frame_tile.h"

namespace df::cpu::DF_ISA {
namespace {
template <class T>
struct Plane {  // two coordinates of kLanes tokens
  Vec<T> re, im;

  Plane(const T* planes, int64_t k, int i)
      : re(load(planes + 2 * k * kTile + i)), im(load(planes + (2 * k + 1) * kTile + i)) {}
};
template <class T>
void put(T* planes, int64_t k, int i, Vec<T> re, Vec<T> im) {
  store(planes + 2 * k * kTile + i, re);
  store(planes + (2 * k + 1) * kTile + i, im);
}

template <class T>
class Backward {
 public:
  Backward(const FrameCpu& call, int64_t head, int64_t first, int64_t last, T* sums, T* memory)
      : p_(call), h_(head), tile_(call, head, first, last), at_(call), sums_(sums) {
    Scratch<T> scratch{memory};
    T** const rows[] = {&x_, &g_};
    for (T** row : rows) *row = scratch.take(p_.D * kTile);
    T** const planes[] = {&by_row_, &c_, &e_, &back_, &change_, &u_, &v_, &sin_, &cos_};
    for (T** plane : planes) *plane = scratch.take(p_.K * kTile);
    t_ = scratch.take(kTile), rate_ = scratch.take(kTile);
    for (int i = 0; i < kTile; ++i) t_[i] = T(tile_.t[i]), rate_[i] = 0;
  }

  void run() {
    const FrameArgs& a = p_.args;
    tile_.load_rows(a.x, x_);
    tile_.load_rows(a.g, g_);
    tile_.coordinates(x_, by_row_, c_);
    tile_.coordinates(g_, by_row_, e_);
    for (int64_t k = 0; k < a.r; ++k) plane(k);
    if (sums_ && p_.W) add_products(g_, e_, u_), add_products(x_, c_, v_);
    if (sums_ && a.generator)
      for (int64_t j = 0; j < a.r; ++j)
        for (int64_t k = j; k < a.r; ++k) pair(j, k);
    if (a.dt)
      for (int64_t i = 0; i < tile_.count; ++i)
        static_cast<T*>(a.dt)[(tile_.first + i) * a.H + h_] = rate_[i];
    tile_.add_planes(change_, by_row_, g_);
    tile_.store_rows(g_, a.y);
  }

 private:
  double theta(int64_t k) const { return p_.args.theta[h_ * p_.args.r + k]; }

  // change, c~, u and v of a plane, and its parts of dt and dtheta.
  void plane(int64_t k) {
    T *sin = sin_ + k * kTile, *cos = cos_ + k * kTile;
    tile_.half_angles(k, sin, cos);
    const T theta = T(this->theta(k));
    Vec<T> dtheta{};
    for (int i = 0; i < kTile; i += kLanes<T>) {
      const SinCos<T> of(load(sin + i), load(cos + i));
      store(sin + i, of.sin), store(cos + i, of.cos);
      const Vec<T> turn = of.turn(), less_one = of.less_one();
      const Plane<T> c(c_, k, i), e(e_, k, i);
      const Vec<T> d0 = e.re * less_one - e.im * turn, d1 = e.re * turn + e.im * less_one;
      const Vec<T> b0 = e.re + d0, b1 = e.im + d1;
      put(change_, k, i, d0, d1), put(back_, k, i, b0, b1);
      const Vec<T> rate = b0 * c.im - b1 * c.re, t = load(t_ + i);
      store(rate_ + i, Vec<T>(load(rate_ + i) + theta * rate));
      dtheta += t * rate;
      if (p_.args.generator) {
        const Integral<T> I(of.sin, of.cos, t, theta);
        put(u_, k, i, Vec<T>(I.even * c.re + I.odd * c.im), Vec<T>(I.even * c.im - I.odd * c.re));
        put(v_, k, i, Vec<T>(-I.even * b0 - I.odd * b1), Vec<T>(I.odd * b0 - I.even * b1));
      } else {
        put(u_, k, i, Vec<T>(c.re * less_one + c.im * turn), Vec<T>(c.im * less_one - c.re * turn));
        put(v_, k, i, d0, d1);
      }
    }
    if (sums_) sums_[at_.dtheta + k] += sum<T>(dtheta);
  }

  // [2 r, D] += planes rows, and [2 r, K] += planes coordinates^T.
  void add_products(const T* rows, const T* coordinates, const T* planes) {
    const int64_t K = 2 * p_.args.r;
    gemm<Into::add>(K, p_.D, kTile, plain(planes, kTile), rows, p_.D, sums_ + at_.planes, p_.D);
    if (!p_.args.generator) return;
    transpose(coordinates, kTile, p_.K, kTile, by_row_, p_.K);
    gemm<Into::add>(K, p_.K, kTile, plain(planes, kTile), by_row_, p_.K, sums_ + at_.across, p_.K);
  }

  // Twice the block of M2, as complex numbers: a plane's Jc is -i, X's commuting part is
  // c~_j conj(c_k) - c_j conj(c~_k), the other c~_j c_k - c_j c~_k.
  void pair(int64_t j, int64_t k) {
    const T less = T(theta(j) - theta(k)), more = T(theta(j) + theta(k));
    const T *sin_j = sin_ + j * kTile, *cos_j = cos_ + j * kTile;
    const T *sin_k = sin_ + k * kTile, *cos_k = cos_ + k * kTile;
    Vec<T> total[4] = {};
    for (int i = 0; i < kTile; i += kLanes<T>) {
      const Plane<T> cj(c_, j, i), ck(c_, k, i), bj(back_, j, i), bk(back_, k, i);
      const Vec<T> t = load(t_ + i);
      const Vec<T> ss = load(sin_j + i) * load(sin_k + i), cc = load(cos_j + i) * load(cos_k + i);
      const Vec<T> sc = load(sin_j + i) * load(cos_k + i), cs = load(cos_j + i) * load(sin_k + i);
      const Integral<T> I(Vec<T>(sc - cs), Vec<T>(cc + ss), t, less);
      const Integral<T> J(Vec<T>(sc + cs), Vec<T>(cc - ss), t, more);
      const Vec<T> p0 = bj.re * ck.re + bj.im * ck.im - cj.re * bk.re - cj.im * bk.im;
      const Vec<T> p1 = bj.im * ck.re - bj.re * ck.im - cj.im * bk.re + cj.re * bk.im;
      const Vec<T> q0 = bj.re * ck.re - bj.im * ck.im - cj.re * bk.re + cj.im * bk.im;
      const Vec<T> q1 = bj.re * ck.im + bj.im * ck.re - cj.re * bk.im - cj.im * bk.re;
      total[0] += I.even * p0 + I.odd * p1;
      total[1] += I.even * p1 - I.odd * p0;
      total[2] += J.even * q0 + J.odd * q1;
      total[3] += J.even * q1 - J.odd * q0;
    }
    const int64_t r = p_.args.r;
    for (int part = 0; part < 4; ++part)
      sums_[at_.pairs + (part * r + j) * r + k] += sum<T>(total[part]);
  }

  const FrameCpu& p_;
  const int64_t h_;
  const FrameTile<T> tile_;
  const FrameSums at_;
  T* const sums_;
  T *x_, *g_, *by_row_, *c_, *e_, *back_, *change_, *u_, *v_, *sin_, *cos_, *t_, *rate_;
};
}  // namespace

void frame_bwd(const FrameCpu& p, bool wide, int64_t h, int64_t first, int64_t last, void* sums,
               void* scratch) {
  wide ? Backward<double>(p, h, first, last, static_cast<double*>(sums),
                          static_cast<double*>(scratch))
             .run()
       : Backward<float>(p, h, first, last, static_cast<float*>(sums), static_cast<float*>(scratch))
             .run();
}

void skew_tridiagonal(int64_t n, double* L, double* e, double* Q, double* scratch) {
  double *v = scratch, *w = scratch + n;
  for (int64_t i = 0; i < n * n; ++i) Q[i] = i % (n + 1) == 0;
  for (int64_t k = 0; k + 2 < n; ++k) {
    // v = sqrt(2) (x + sign(x_0) |x| e_0) / |...|, so that the reflection is I - v v^T
    double size = 0, norm = 0, square = 0;
    for (int64_t i = k + 1; i < n; ++i) size = __builtin_fmax(size, __builtin_fabs(L[i * n + k]));
    if (size == 0) continue;
    for (int64_t i = k + 1; i < n; ++i) v[i] = L[i * n + k] / size, norm += v[i] * v[i];
    v[k + 1] += v[k + 1] < 0 ? -__builtin_sqrt(norm) : __builtin_sqrt(norm);
    for (int64_t i = k + 1; i < n; ++i) square += v[i] * v[i];
    const double scale = __builtin_sqrt(2 / square);
    for (int64_t i = k + 1; i < n; ++i) v[i] *= scale;
    // L skew: H L H = L + v w^T - w v^T with w = L v
    for (int64_t i = k; i < n; ++i) {
      w[i] = 0;
      for (int64_t j = k + 1; j < n; ++j) w[i] += L[i * n + j] * v[j];
    }
    v[k] = 0;
    for (int64_t i = k; i < n; ++i)
      for (int64_t j = k; j < n; ++j) L[i * n + j] += v[i] * w[j] - w[i] * v[j];
    for (int64_t i = 0; i < n; ++i) {
      double along = 0;
      for (int64_t j = k + 1; j < n; ++j) along += Q[i * n + j] * v[j];
      for (int64_t j = k + 1; j < n; ++j) Q[i * n + j] -= along * v[j];
    }
  }
  for (int64_t i = 0; i + 1 < n; ++i) e[i] = L[i * n + i + 1];
}
}  // namespace df::cpu::DF_ISA
