#include "common/op.h"

DF_SCHEMAS(m) {
  // Rewrite (absent without k), read-out, norm and projections on rows; csrc/ddl/boundary.h has the
  // equations. x [N, d, d_v]; k [N, d]; v [N, d_v], beta, beta_erase [N] in the compute type; act:
  // the DType of x_in and c. flags: python/deltafuse/ddl/ops.py. Results that were not asked for
  // are empty.
  m.def(
      "ddl_boundary_fwd(Tensor x, Tensor? k, Tensor? v, Tensor? beta, Tensor? beta_erase,"
      " Tensor? read, Tensor? norm, Tensor? W_v, Tensor? b_v, Tensor? W_beta, Tensor? b_beta,"
      " int act, float k_eps, float norm_eps, float v_scale, int flags)"
      " -> (Tensor y, Tensor x_in, Tensor c, Tensor z_v, Tensor z_beta, Tensor saved)");
  // y: the state that was read out. Gradients of everything from x to b_beta, in its dtype.
  m.def(
      "ddl_boundary_bwd(Tensor? d_y, Tensor? d_x_in, Tensor? d_c, Tensor? d_z_v, Tensor? d_z_beta,"
      " Tensor y, Tensor? k, Tensor? v, Tensor? beta, Tensor? beta_erase, Tensor? read,"
      " Tensor? norm, Tensor? W_v, Tensor? b_v, Tensor? W_beta, Tensor? b_beta, Tensor saved,"
      " int act, float v_scale, int flags)"
      " -> (Tensor dx, Tensor dk, Tensor dv, Tensor dbeta, Tensor dbeta_erase, Tensor dread,"
      " Tensor dnorm, Tensor dW_v, Tensor db_v, Tensor dW_beta, Tensor db_beta)");
  // The rewrite alone, into out, which may be x itself.
  m.def(
      "ddl_rewrite_out(Tensor x, Tensor k, Tensor v, Tensor beta, Tensor? beta_erase,"
      " Tensor(a!) out, float k_eps, float v_scale, int flags) -> ()");
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
