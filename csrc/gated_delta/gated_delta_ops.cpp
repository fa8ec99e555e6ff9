#include "common/op.h"

DF_SCHEMAS(m) {
  // sigmoid_scale: 0 = beta is given, else beta = sigmoid_scale * sigmoid(beta)
  // A_log given: g is the pre-activation a, g = -exp(A_log) softplus(a + dt_bias)
  // high_precision, split (1 always, 0 if it pays, -1 never), batch_invariant: of CUDA kernels
  // save: 0 nothing, 1 the inverses T' only, 2 all that the backward else computes again
  m.def(
      "gated_delta_fwd(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial_state,"
      " Tensor? cu_seqlens, Tensor? A_log, Tensor? dt_bias, float scale, bool l2norm,"
      " float sigmoid_scale, bool state_v_first, int chunk_size, bool high_precision, int split,"
      " bool batch_invariant, bool output_final_state, int save)"
      " -> (Tensor o, Tensor final_state, Tensor saved)");
  m.def(
      "gated_delta_bwd(Tensor d_o, Tensor? d_final_state, Tensor? saved, Tensor q, Tensor k,"
      " Tensor v, Tensor g, Tensor beta, Tensor? initial_state, Tensor? cu_seqlens, Tensor? A_log, "
      "Tensor? dt_bias,"
      " float scale, bool l2norm, float sigmoid_scale, bool state_v_first, int chunk_size,"
      " bool high_precision, int split, bool batch_invariant)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor d_initial_state,"
      " Tensor dA_log, Tensor ddt_bias)");
  // per token; gk [B,T,HV,K] and gv [B,T,HV,V] decay channels, beta may be [B,T,HV,V]
  m.def(
      "gated_delta_recurrent_fwd(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? gk, Tensor? gv,"
      " Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens, Tensor? A_log, Tensor? dt_bias,"
      " float scale, bool l2norm, float sigmoid_scale, bool state_v_first,"
      " bool output_final_state) -> (Tensor o, Tensor final_state)");
  m.def(
      "gated_delta_recurrent_bwd(Tensor d_o, Tensor? d_final_state, Tensor q, Tensor k, Tensor v,"
      " Tensor? g, Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens, Tensor? A_log,"
      " Tensor? dt_bias, float scale, bool l2norm, float sigmoid_scale, bool state_v_first)"
      " -> (Tensor dq, Tensor dk, Tensor dv, Tensor dg, Tensor dbeta, Tensor d_initial_state,"
      " Tensor dA_log, Tensor ddt_bias)");
  // in place on a pool of states; snapshots [B,T,...state] receive the state after each token
  m.def(
      "gated_delta_decode(Tensor q, Tensor k, Tensor v, Tensor(a!) state, Tensor A_log, Tensor a,"
      " Tensor? dt_bias, Tensor b, float scale, Tensor(b!) output, bool l2norm,"
      " Tensor? state_indices, Tensor? output_state_indices, bool state_v_first,"
      " Tensor(c!)? snapshots) -> ()");
  // depthwise over x [B,T,D] with weight [D,W]; states [N,D,W-1] in x's dtype
  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state,"
      " Tensor? cu_seqlens, bool silu, bool output_final_state) -> (Tensor y, Tensor final_state)");
  m.def(
      "causal_conv1d_bwd(Tensor dy, Tensor? d_final_state, Tensor x, Tensor weight, Tensor? bias,"
      " Tensor? initial_state, Tensor? cu_seqlens, bool silu)"
      " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor d_initial_state)");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, bool silu)"
      " -> Tensor");
  // rows [rows, V], [rows, HV]
  m.def("gated_rms_norm_fwd(Tensor x, Tensor weight, Tensor? gate, float eps) -> Tensor");
  m.def(
      "gated_rms_norm_bwd(Tensor dy, Tensor x, Tensor weight, Tensor? gate, float eps)"
      " -> (Tensor dx, Tensor dweight, Tensor dgate)");
  m.def("l2norm_fwd(Tensor x, float eps) -> Tensor");
  m.def("l2norm_bwd(Tensor dy, Tensor x, float eps) -> Tensor");
  m.def("gdn_gate_fwd(Tensor a, Tensor A_log, Tensor? dt_bias) -> Tensor");
  m.def(
      "gdn_gate_bwd(Tensor dg, Tensor a, Tensor A_log, Tensor? dt_bias)"
      " -> (Tensor da, Tensor dA_log, Tensor ddt_bias)");
}
