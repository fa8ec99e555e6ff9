// The seam of rotations in learned planes: a frame W [D, 2r] and angles theta [r] a head turn
//   y = x + W (Rc(t theta) - I) W^T x,   Rc(f) = [[cos f, sin f], [-sin f, cos f]] a plane.
// Backward, for upstream g, with c = W^T x, e = W^T g and a plane's c~ = Rc^T e:
//   dx = g + W (c~ - e),   dt = sum_k theta_k (c~_2k c_2k+1 - c~_2k+1 c_2k),   dtheta alike with t
//   frame:      dW = sum_n g u^T + x v^T,  u = (Rc - I) c,  v = c~ - e
//   generator:  P  = sum_n g u^T + x v^T,  u = I(theta, t) c,  v = -I(theta, t) c~
//               K  = M2 - sum_n e u^T + c v^T
// with I(om, t) = int_0^t Rc(s om) ds; the gradient of the generator's planes then goes through
// N = P + W K. M2's block of planes j and k is I(theta_j - theta_k) on the part of
// X = c~_j c_k^T - c_j c~_k^T that commutes with Rc, I(theta_j + theta_k) on the rest.
#pragma once
#include "common/dtype.h"

namespace df {
struct FrameRows {  // [B, T, H, D] with unit last stride; strides in elements
  const void* data = nullptr;
  int64_t b = 0, t = 0, h = 0;
};

struct FrameArgs {
  int64_t B, T, H, D, r;
  DType type;           // of x, y and their gradients
  FrameRows x;          // backward: beside g
  FrameRows g;          // backward only
  const double* theta;  // [H, r]
  const double* t;      // [B, T]
  void* y;              // [B, T, H, D], contiguous; backward: dx
  void* dt;             // [B, T, H] in the compute type; null: not wanted
  bool frame;           // dW and dtheta are wanted
  bool generator;       // P and K are wanted
};
}  // namespace df
