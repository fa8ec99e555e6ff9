#include "common/cpu/convert.h"
#include "common/cpu/gemm.h"
#include "common/cpu/math.h"
#include "python/doors.h"

namespace df::cpu::DF_ISA {
namespace {
template <class T>
Vec<T> apply(DoorFn fn, Vec<T> x) {
  switch (fn) {
    case DoorFn::exp: return exp<T>(x);
    case DoorFn::log: return log<T>(x);
    case DoorFn::sigmoid: return sigmoid<T>(x);
    case DoorFn::silu: return silu<T>(x);
    default: return softplus<T>(x);
  }
}

template <class T>
void map(DoorFn fn, const T* x, T* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    Vec<T> v{};
    const int64_t bytes = (n - i < kLanes<T> ? n - i : kLanes<T>)*int64_t(sizeof(T));
    __builtin_memcpy(&v, x + i, bytes);
    v = apply<T>(fn, v);
    __builtin_memcpy(y + i, &v, bytes);
  }
}

template <class E>
void round_trip(const float* x, uint16_t* bits, float* y, int64_t n) {
  store_row(x, reinterpret_cast<E*>(bits), n);
  load_row(reinterpret_cast<const E*>(bits), y, n);
}

template <class T, Into into>
void multiply(const DoorGemm& d) {
  const T *a = static_cast<const T*>(d.a), *b = static_cast<const T*>(d.b);
  T* c = static_cast<T*>(d.c);
  const Strided<T> s = d.transposed ? transposed(a, d.m) : plain(a, d.k);
  switch (d.shape) {
    case 1: return gemm<into, Shape::lower>(d.m, d.n, d.k, s, b, d.n, c, d.n);
    case 2: return gemm<into, Shape::upper>(d.m, d.n, d.k, s, b, d.n, c, d.n);
    default: return gemm<into>(d.m, d.n, d.k, s, b, d.n, c, d.n);
  }
}
}  // namespace

void door_math(DoorFn fn, bool f64, const void* x, void* y, int64_t n) {
  f64 ? map(fn, static_cast<const double*>(x), static_cast<double*>(y), n)
      : map(fn, static_cast<const float*>(x), static_cast<float*>(y), n);
}

void door_round_trip(bool half, const float* x, uint16_t* bits, float* y, int64_t n) {
  half ? round_trip<f16>(x, bits, y, n) : round_trip<bf16>(x, bits, y, n);
}

void door_gemm(const DoorGemm& d) {
  if (d.f64) return d.add ? multiply<double, Into::add>(d) : multiply<double, Into::set>(d);
  return d.add ? multiply<float, Into::add>(d) : multiply<float, Into::set>(d);
}
}  // namespace df::cpu::DF_ISA
