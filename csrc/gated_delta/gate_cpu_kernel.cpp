// Gradients, with a' = a + dt_bias: da = dg rate sigmoid(a'), summed before it is rounded for
// dt_bias; dA_log = sum dg g.
#include "common/cpu/math.h"
#include "common/cpu/partial.h"
#include "gated_delta/gate.h"

namespace df::cpu::DF_ISA {
namespace {
// fn(i, c, part) for the elements [first, last), c being the column within the period.
template <class T, class Fn>
void over_periods(const GateArgs& p, int64_t first, int64_t last, Fn fn) {
  for (int64_t i = first; i < last; i += p.period)
    over_row<T>(last - i < p.period ? last - i : p.period,
                [&](int64_t c, auto part) { fn(i + c, c, part); });
}

template <class E>
void fwd(const GateArgs& p, int64_t first, int64_t last) {
  using T = Compute<E>;
  const T *rate = static_cast<const T*>(p.rate), *bias = static_cast<const T*>(p.dt_bias);
  over_periods<T>(p, first, last, [&](int64_t i, int64_t c, auto part) {
    const Vec<T> a = load_part<T>(static_cast<const E*>(p.a) + i, part) + load(bias + c);
    store_part<T>(load(rate + c) * softplus<T>(a), static_cast<T*>(p.g) + i, part);
  });
}

template <class E>
void bwd(const GateArgs& p, int64_t first, int64_t last, void* sums) {
  using T = Compute<E>;
  const T *rate = static_cast<const T*>(p.rate), *bias = static_cast<const T*>(p.dt_bias);
  T *dA_log = static_cast<T*>(sums), *ddt_bias = dA_log + p.period;
  over_periods<T>(p, first, last, [&](int64_t i, int64_t c, auto part) {
    const Vec<T> a = load_part<T>(static_cast<const E*>(p.a) + i, part) + load(bias + c);
    const Vec<T> dg = load_part<T>(static_cast<const T*>(p.dg) + i, part);
    const Vec<T> scaled = dg * load(rate + c), da = scaled * sigmoid<T>(a);
    store_part<T>(da, static_cast<E*>(p.da) + i, part);
    const Vec<T> dA = scaled * softplus<T>(a);
    store_part<T>(load(dA_log + c) + dA, dA_log + c, part);
    store_part<T>(load(ddt_bias + c) + da, ddt_bias + c, part);
  });
}
}  // namespace

void gdn_gate_fwd(const GateArgs& p, int64_t first, int64_t last) {
  dispatch(p.dtype, [&](auto type) { fwd<typename decltype(type)::type>(p, first, last); });
}
void gdn_gate_bwd(const GateArgs& p, int64_t first, int64_t last, void* sums) {
  dispatch(p.dtype, [&](auto type) { bwd<typename decltype(type)::type>(p, first, last, sums); });
}
}  // namespace df::cpu::DF_ISA
