// How the kernels of this operator are handed tensors: plain data, no torch.
#pragma once
#include "common/dtype.h"

namespace df {
// [B,T,H] or [B,T,H,D] with any strides but the last dimension's, which is 1.
struct Input {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t b = 0, t = 0, h = 0;
  int64_t at(int64_t batch, int64_t token, int64_t head) const {
    return batch * b + token * t + head * h;
  }
};

// Contiguous, read element by element or row by row; data may be null.
struct Dense {
  const void* data = nullptr;
  DType dtype = DType::f32;
};
using State = Dense;

// What becomes of g and beta before the recurrence (gated_delta.md, 2.2).
struct PreActivation {
  Dense A_log, dt_bias;      // A_log given: g = -exp(A_log) softplus(g + dt_bias)
  double sigmoid_scale = 0;  // > 0: beta = sigmoid_scale * sigmoid(beta)
};
}  // namespace df
