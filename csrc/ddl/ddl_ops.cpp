#include "common/op.h"

DF_SCHEMAS(m) {
  // w [K,d,d_v] in the compute type, the tap of the current token first; states, with the channels
  // of x (C = d d_v, or d), are [N,C,K-1] in x's dtype
  m.def(
      "ddl_tc_fwd(Tensor x, Tensor w, Tensor? initial_state, Tensor? cu_seqlens,"
      " bool output_final_state) -> (Tensor y, Tensor final_state)");
  m.def(
      "ddl_tc_bwd(Tensor dy, Tensor? d_final_state, Tensor x, Tensor w, Tensor? initial_state,"
      " Tensor? cu_seqlens) -> (Tensor dx, Tensor dw, Tensor d_initial_state)");
  m.def(
      "ddl_ec_fwd(Tensor x, Tensor w, Tensor? initial_state, Tensor? cu_seqlens,"
      " bool output_final_state) -> (Tensor y, Tensor final_state)");
  m.def(
      "ddl_ec_bwd(Tensor dy, Tensor? d_final_state, Tensor x, Tensor w, Tensor? initial_state,"
      " Tensor? cu_seqlens) -> (Tensor dx, Tensor dw, Tensor d_initial_state)");
  // x [B,T,H,D], weights [B,T,H], cache [N,H,D]
  m.def(
      "token_shift_fwd(Tensor x, Tensor prev_weight, Tensor curr_weight, Tensor? cache,"
      " Tensor? cu_seqlens, bool output_cache) -> (Tensor y, Tensor cache)");
  m.def(
      "token_shift_bwd(Tensor dy, Tensor? d_cache, Tensor x, Tensor prev_weight,"
      " Tensor curr_weight, Tensor? cache, Tensor? cu_seqlens)"
      " -> (Tensor dx, Tensor dprev_weight, Tensor dcurr_weight, Tensor dcache)");
}
