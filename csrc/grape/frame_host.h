// Tensors to the arguments of the rotation, for both devices' host code.
#pragma once
#include "common/op.h"
#include "grape/frame.h"

namespace df {
// In the order of python/deltafuse/grape/raw_frame.py.
enum FrameWanted : int64_t { kWantT = 1, kWantFrame = 2, kWantGenerator = 4 };

inline FrameRows frame_rows(const Tensor& x) {
  return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

// Keeps alive what the arguments point to. Python has checked shapes with better messages.
struct FrameInputs {
  Tensor x;
  OptTensor W;
  Tensor theta, t;

  FrameInputs(const Tensor& x_, const OptTensor& W_, const Tensor& theta_, const Tensor& t_)
      : x(unit_last_stride(x_)),
        W(W_ ? OptTensor(contiguous(*W_)) : W_),
        theta(contiguous(theta_)),
        t(contiguous(t_)) {
    STD_TORCH_CHECK(x.dim() == 4 && theta.dim() == 2 && t.dim() == 2,
                    "grape: x must be [B, T, H, D], theta [H, r] and t [B, T]");
    const int64_t H = x.size(2), D = x.size(3), r = theta.size(1);
    STD_TORCH_CHECK(theta.size(0) == H && t.size(0) == x.size(0) && t.size(1) == x.size(1),
                    "grape: x must be [B, T, H, D], theta [H, r] and t [B, T]");
    STD_TORCH_CHECK(2 * r <= D, "grape: 2 r must be at most D");
    STD_TORCH_CHECK(
        theta.scalar_type() == ScalarType::Double && t.scalar_type() == ScalarType::Double,
        "grape: theta and t must be float64");
    if (!W) return;
    STD_TORCH_CHECK(
        W->dim() == 3 && W->size(0) == H && W->size(1) == D && W->size(2) == 2 * r &&
            (W->scalar_type() == ScalarType::Double || W->scalar_type() == ScalarType::Float),
        "grape: W must be [H, D, 2 r] in float32 or float64");
  }

  FrameArgs args() const {
    FrameArgs p{};
    p.B = x.size(0), p.T = x.size(1), p.H = x.size(2), p.D = x.size(3), p.r = theta.size(1);
    p.type = dtype(x), p.x = frame_rows(x);
    p.theta = static_cast<const double*>(theta.const_data_ptr());
    p.t = static_cast<const double*>(t.const_data_ptr());
    return p;
  }
};
}  // namespace df
