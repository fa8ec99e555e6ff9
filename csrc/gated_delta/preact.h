// What the kernels fuse in front of the recurrence, one token and head at a time: the l2norm of a
// row, the gate, the sigmoid of beta, and their derivatives. Scalars go through double, so that a
// float kernel's gates are right to the last bit whatever the instruction set.
//   x^ = r x, r = (sum x^2 + 1e-6)^-1/2;   g = -exp(A_log) softplus(a + dt_bias), at least -88;
//   beta = m sigmoid(b)
#pragma once
#include "common/cpu/math.h"

namespace df::cpu::DF_ISA {
// Rows of n elements, n arbitrary; lanes are added in a fixed order.
template <class T>
inline T dot_row(const T* x, const T* y, int64_t n) {
  constexpr int64_t L = kLanes<T>;
  Vec<T> lanes[4] = {};
  T tail = 0;
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
    for (int w = 0; w < 4; ++w) lanes[w] += load(x + i + w * L) * load(y + i + w * L);
  for (; i + L <= n; i += L) lanes[0] += load(x + i) * load(y + i);
  for (; i < n; ++i) tail += x[i] * y[i];
  return sum<T>((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + tail;
}
template <class T>
inline T inverse_norm(const T* x, int64_t n) {
  return T(1 / __builtin_sqrt(double(dot_row(x, x, n)) + 1e-6));
}
// In place: the gradient of x^ becomes that of x, r (dx^ - x^ (x^ . dx^)).
template <class T>
inline void l2norm_bwd(const T* x_hat, T r, T* dx, int64_t n) {
  const T along = dot_row(x_hat, dx, n);
  for (int64_t i = 0; i < n; ++i) dx[i] = r * (dx[i] - x_hat[i] * along);
}

// exp(-88) is the smallest decay that float tells from 0; -inf means a reset, NaN stays NaN.
constexpr double kMinGate = -88;
template <class T>
inline T clamp_gate(T g) {
  return g < T(kMinGate) ? T(kMinGate) : g;
}
template <class T>
inline T clamp_gate_bwd(T g, T dg) {
  return g < T(kMinGate) ? T(0) : dg;
}

struct Gate {  // of one value head
  double rate, dt_bias;
};
inline Gate make_gate(double A_log, double dt_bias) {
  return {-__builtin_exp(A_log), dt_bias};
}
inline double gate(Gate h, double a) {  // not clamped
  const double x = a + h.dt_bias;
  return h.rate * (x > 20 ? x : __builtin_log1p(__builtin_exp(x)));
}
// d gate / da = d gate / d dt_bias; d gate / d A_log is the gate itself. All zero where clamped.
inline double gate_slope(Gate h, double a) {
  return h.rate * logistic(a + h.dt_bias);
}

inline double sigmoid_beta(double b, double m) {
  return m * logistic(b);
}
inline double sigmoid_beta_bwd(double beta, double m, double dbeta) {
  return dbeta * beta * (1 - beta / m);
}
}  // namespace df::cpu::DF_ISA
