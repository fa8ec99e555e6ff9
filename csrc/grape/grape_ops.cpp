#include "common/op.h"

DF_SCHEMAS(m) {
  // Rotations of q [B, T, Hq, D] and k [B, T, Hk, D] in coordinate planes; csrc/grape/rotary.h has
  // the equations and the shapes. flags: 1 interleaved, 2 clockwise, 4 tables' rows are positions.
  m.def(
      "grape_rotary_fwd(Tensor q, Tensor? k, Tensor? freqs, Tensor? positions, Tensor? offsets,"
      " Tensor? cu_seqlens, Tensor? cos_q, Tensor? sin_q, Tensor? cos_k, Tensor? sin_k,"
      " SymInt offset, float factor, int flags) -> (Tensor y_q, Tensor y_k)");
  // q, k: the rotated ones for gradients of angles (flag 8), the original ones for those of tables
  // (flag 16), else absent. dpositions is float64; gradients of tables are [B, T, Ha, P].
  m.def(
      "grape_rotary_bwd(Tensor dy_q, Tensor? dy_k, Tensor? q, Tensor? k, Tensor? freqs,"
      " Tensor? positions, Tensor? offsets, Tensor? cu_seqlens, Tensor? cos_q, Tensor? sin_q,"
      " Tensor? cos_k, Tensor? sin_k, SymInt offset, float factor, int flags)"
      " -> (Tensor dq, Tensor dk, Tensor dfreqs, Tensor dpositions, Tensor dcos_q, Tensor dsin_q,"
      " Tensor dcos_k, Tensor dsin_k)");
  // Into out_q and out_k, which may be q and k themselves.
  m.def(
      "grape_rotary_out(Tensor q, Tensor? k, Tensor? freqs, Tensor? positions, Tensor? offsets,"
      " Tensor? cu_seqlens, Tensor? cos_q, Tensor? sin_q, Tensor? cos_k, Tensor? sin_k,"
      " SymInt offset, float factor, int flags, Tensor(a!) out_q, Tensor(b!)? out_k) -> ()");
  // The contextual phase of omega [B, T, M], csrc/grape/phase.h: phi float64, final int64 [N, M].
  m.def(
      "grape_phase_fwd(Tensor omega, Tensor? cu_seqlens, Tensor? initial)"
      " -> (Tensor phi, Tensor final)");
  m.def("grape_phase_bwd(Tensor d_phi, Tensor? cu_seqlens) -> Tensor d_omega");
  // Rotation in the planes of a frame; csrc/grape/frame.h has the equations. x [B, T, H, D];
  // W [H, D, 2 r] in float32 or float64, absent: the planes are neighbouring channels; theta
  // [H, r] and t [B, T] in float64.
  m.def("grape_frame_fwd(Tensor x, Tensor? W, Tensor theta, Tensor t) -> Tensor");
  // The same, as a function of the planes a, b [H, r, D] and omega [H, r] that the frame is of.
  m.def(
      "grape_mixture_fwd(Tensor x, Tensor a, Tensor b, Tensor omega, Tensor t, Tensor W,"
      " Tensor theta) -> Tensor");
  // wanted: python/deltafuse/grape/raw_frame.py. dt [B, T, H], dW [H, 2 r, D] (transposed; or P),
  // K [H, 2 r, 2 r] and dtheta [H, r] in the compute type; empty where they were not asked for.
  m.def(
      "grape_frame_bwd(Tensor dy, Tensor x, Tensor? W, Tensor theta, Tensor t, int wanted)"
      " -> (Tensor dx, Tensor dt, Tensor dW, Tensor K, Tensor dtheta)");
  // L [H, n, n] skew = Q A Q^T, A skew tridiagonal with the superdiagonal e [H, n - 1].
  m.def("grape_skew_tridiagonal(Tensor L) -> (Tensor e, Tensor Q)");
}
