// Running sums over the tokens of a sequence, for neighbouring phases side by side.
#include "common/cpu/convert.h"
#include "grape/phase.h"

namespace df::cpu::DF_ISA {
namespace {
template <class E>
void forward(const PhaseArgs& p, int64_t n, int64_t m0, int64_t m1) {
  const PhaseRow row = phase_row(p, n);
  int64_t sum[kPhaseBlock];
  for (int64_t m = m0; m < m1; ++m) sum[m - m0] = p.initial ? p.initial[n * p.M + m] : 0;
  for (int64_t t = row.begin; t < row.end; ++t) {
    const E* omega = static_cast<const E*>(p.in) + row.batch * p.b + t * p.t;
    double* phi = p.out + (row.batch * p.T + t) * p.M;
    for (int64_t m = m0; m < m1; ++m) {
      phi[m] = double(sum[m - m0]) * kPhaseUnit;
      const double units = double(to_compute(omega[m * p.m])) / kPhaseUnit;
      sum[m - m0] += int64_t(__builtin_rint(units));
    }
  }
  for (int64_t m = m0; m < m1; ++m) p.final[n * p.M + m] = sum[m - m0];
}

template <class E>
void backward(const PhaseArgs& p, int64_t n, int64_t m0, int64_t m1) {
  const PhaseRow row = phase_row(p, n);
  double sum[kPhaseBlock] = {};
  for (int64_t t = row.end - 1; t >= row.begin; --t) {
    const E* d_phi = static_cast<const E*>(p.in) + row.batch * p.b + t * p.t;
    double* d_omega = p.out + (row.batch * p.T + t) * p.M;
    for (int64_t m = m0; m < m1; ++m) {
      d_omega[m] = sum[m - m0];
      sum[m - m0] += double(to_compute(d_phi[m * p.m]));
    }
  }
}
}  // namespace

void phase_fwd(const PhaseArgs& p, int64_t n, int64_t m0, int64_t m1) {
  dispatch(p.type, [&](auto tag) { forward<typename decltype(tag)::type>(p, n, m0, m1); });
}
void phase_bwd(const PhaseArgs& p, int64_t n, int64_t m0, int64_t m1) {
  dispatch(p.type, [&](auto tag) { backward<typename decltype(tag)::type>(p, n, m0, m1); });
}
}  // namespace df::cpu::DF_ISA
