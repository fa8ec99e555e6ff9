// A few tokens of the gated delta rule on an indexed pool of states, in place. The seam between
// the host functions and the kernels of all devices.
//   q, k [B,T,H,K]; v, output [B,T,HV,V]; a, b [B,T,HV]; A_log, dt_bias [HV]; read, write [B]
//   state [P,HV,V,K] (v_first) or [P,HV,K,V]; snapshots [B,T] of the same; 1 <= T <= 8
#pragma once
#include "common/isa.h"
#include "gated_delta/input.h"

namespace df {
struct DecodeArgs {
  Input q, k, v, a, b, o;                      // o: the output's strides and type, written
  Dense A_log, dt_bias;                        // dt_bias may be null
  const void *read, *write;                    // null: row b; write null: as read
  void *state, *output, *snapshots;            // snapshots may be null
  int64_t B, T, H, HV, K, V, P, state_stride;  // state_stride: elements from slot to slot
  double scale;
  DType state_type;
  bool l2norm, v_first, read64, write64;
};

void decode_f32_cuda(const DecodeArgs& args, void* stream);  // by the type of the state
void decode_bf16_cuda(const DecodeArgs& args, void* stream);
void decode_f16_cuda(const DecodeArgs& args, void* stream);

namespace cpu {
constexpr int64_t kDecodeTile = 64;  // rows of V a task
inline int64_t decode_tiles(const DecodeArgs& p) {
  return (p.V + kDecodeTile - 1) / kDecodeTile;
}
// q^ and k^ of all tokens, a tile of S, and rows of v and o.
inline int64_t decode_scratch(const DecodeArgs& p) {
  return 2 * p.T * p.K + kDecodeTile * p.K + 2 * kDecodeTile;
}
// Tasks [begin, end) of B * HV * decode_tiles; scratch: decode_scratch doubles.
DF_DECLARE_CPU(decode, const DecodeArgs&, double* scratch, int64_t begin, int64_t end)
}  // namespace cpu
}  // namespace df
