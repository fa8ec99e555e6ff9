// The seam of the contextual phase, within a sequence:
//   phi_t = initial + sum_{s<t} omega_s,  final = initial + sum_s omega_s
// in int64 units of 2^-40: each omega is rounded to a unit, and sums of integers do not depend on
// how they are divided. Backward, in double: d omega_s = sum_{t>s} d phi_t.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"

namespace df {
constexpr double kPhaseUnit = 0x1p-40;

struct PhaseArgs {
  int64_t B, T, M;                   // M phases a token
  const void* in;                    // omega or d phi, [B, T, M]
  DType type;                        // of `in`
  int64_t b, t, m;                   // its strides
  const void* cu_seqlens = nullptr;  // [N + 1]; null: a sequence is a row of the batch
  bool cu64 = false;
  int64_t N;
  const int64_t* initial = nullptr;  // [N, M]
  double* out;                       // phi or d omega, [B, T, M]
  int64_t* final = nullptr;          // [N, M]
};

struct PhaseRow {  // a sequence
  int64_t batch, begin, end;
};
#ifdef __CUDACC__
__host__ __device__
#endif
    inline PhaseRow
    phase_row(const PhaseArgs& p, int64_t n) {
  if (!p.cu_seqlens) return {n, 0, p.T};
  const auto at = [&](int64_t i) {
    return p.cu64 ? static_cast<const int64_t*>(p.cu_seqlens)[i]
                  : int64_t(static_cast<const int32_t*>(p.cu_seqlens)[i]);
  };
  return {0, at(n), at(n + 1)};
}

namespace cpu {
// Phases [m0, m1) of sequence n.
DF_DECLARE_CPU(phase_fwd, const PhaseArgs&, int64_t n, int64_t m0, int64_t m1)
DF_DECLARE_CPU(phase_bwd, const PhaseArgs&, int64_t n, int64_t m0, int64_t m1)
constexpr int64_t kPhaseBlock = 64;  // phases, at most
}  // namespace cpu
void phase_fwd_cuda(const PhaseArgs& p, void* stream);
void phase_bwd_cuda(const PhaseArgs& p, void* stream);
}  // namespace df
