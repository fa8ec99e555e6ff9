#include <algorithm>
#include <memory>

#include "gated_delta/decode_host.h"

namespace df::cpu {
// A bad slot would write into foreign memory; here, unlike on a GPU, looking costs nothing.
static void check_slots(const void* indices, bool is64, const DecodeArgs& p, const char* name) {
  if (!indices) return;
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t slot =
        is64 ? static_cast<const int64_t*>(indices)[b] : static_cast<const int32_t*>(indices)[b];
    STD_TORCH_CHECK(slot < p.P, "gated_delta_rule_decode: ", name, "[", b, "] = ", slot,
                    " is not a slot of a pool of ", p.P);
  }
}

static void decode_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& state,
                      const Tensor& A_log, const Tensor& a, const OptTensor& dt_bias,
                      const Tensor& b, double scale, const Tensor& output, bool l2norm,
                      const OptTensor& read, const OptTensor& write, bool v_first,
                      const OptTensor& snapshots) {
  const DecodeTensors t = decode_tensors(q, k, v, state, A_log, a, dt_bias, b, scale, output,
                                         l2norm, read, write, v_first, snapshots);
  const DecodeArgs& p = t.args;
  check_slots(p.read, p.read64, p, "state_indices");
  check_slots(p.write, p.write64, p, "output_state_indices");
  auto* kernel = DF_CPU(decode);
  // a thread is worth waking for about 64 KB of state
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.K * kDecodeTile));
  parallel_for(0, p.B * p.HV * decode_tiles(p), grain, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<double[]> scratch(new double[decode_scratch(p)]);
    kernel(p, scratch.get(), begin, end);
  });
}
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("gated_delta_decode", TORCH_BOX(&df::cpu::decode_op));
}
