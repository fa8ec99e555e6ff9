// The operator's tensors to the plain arguments of decode.h; Python has checked shapes and types.
#pragma once
#include "gated_delta/decode.h"
#include "gated_delta/input_host.h"

namespace df {
struct DecodeTensors {  // with unit last strides; owns the copies where there were none
  Tensor q, k, v, state, A_log, a;
  OptTensor dt_bias;
  Tensor b, output;
  OptTensor read, write, snapshots;
  DecodeArgs args;
};

inline DecodeTensors decode_tensors(const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& state, const Tensor& A_log, const Tensor& a,
                                    const OptTensor& dt_bias, const Tensor& b, double scale,
                                    const Tensor& output, bool l2norm, const OptTensor& read,
                                    const OptTensor& write, bool v_first,
                                    const OptTensor& snapshots) {
  DecodeTensors t{unit_last_stride(q),
                  unit_last_stride(k),
                  unit_last_stride(v),
                  state,
                  contiguous(A_log),
                  a,
                  contiguous(dt_bias),
                  b,
                  output,
                  contiguous(read),
                  contiguous(write),
                  snapshots,
                  DecodeArgs{}};
  const auto is64 = [](const OptTensor& x) { return x && x->scalar_type() == ScalarType::Long; };
  DecodeArgs& p = t.args;
  p.q = input(t.q), p.k = input(t.k), p.v = input(t.v), p.a = input(a), p.b = input(b);
  p.o = input(output);
  p.A_log = dense(t.A_log), p.dt_bias = dense(t.dt_bias);
  p.read = data(t.read), p.write = data(t.write);
  p.state = state.mutable_data_ptr(), p.output = output.mutable_data_ptr();
  p.snapshots = snapshots ? snapshots->mutable_data_ptr() : nullptr;
  p.B = q.size(0), p.T = q.size(1), p.H = q.size(2), p.K = q.size(3);
  p.HV = v.size(2), p.V = v.size(3), p.P = state.size(0), p.state_stride = state.stride(0);
  p.scale = scale, p.state_type = dtype(state);
  p.l2norm = l2norm, p.v_first = v_first, p.read64 = is64(read), p.write64 = is64(write);
  return t;
}
}  // namespace df
