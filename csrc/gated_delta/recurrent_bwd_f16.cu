// recurrent_bwd.cuh for q, k, v of type f16.
#include "gated_delta/recurrent_bwd.cuh"

void df::recurrent_bwd_f16_cuda(const RecurrentBwdLaunch& launch, void* stream) {
  cuda::recurrent_bwd_dispatch<f16>(launch, stream);
}
