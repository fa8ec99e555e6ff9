#include "common/op.h"

DF_SCHEMAS(m) {
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
