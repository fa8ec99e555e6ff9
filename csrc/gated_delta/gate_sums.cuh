// Where the gradients of A_log and dt_bias go, from partial sums [rows, 2, HV].
#pragma once
#include "common/cuda/column_sums.cuh"
#include "gated_delta/input.h"

namespace df::cuda {
struct GateSums {
  int64_t HV;
  void *dA_log, *ddt_bias;  // ddt_bias may be null
  DType A_log_type, dt_bias_type;
  __device__ void operator()(int64_t column, float total) const {
    if (column < HV)
      store_any(total, dA_log, A_log_type, column);
    else if (ddt_bias)
      store_any(total, ddt_bias, dt_bias_type, column - HV);
  }
};
}  // namespace df::cuda
