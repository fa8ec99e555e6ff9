// recurrent_bwd.cuh for q, k, v of type float.
#include "gated_delta/recurrent_bwd.cuh"

void df::recurrent_bwd_f32_cuda(const RecurrentBwdLaunch& launch, void* stream) {
  cuda::recurrent_bwd_dispatch<float>(launch, stream);
}
