// recurrent_bwd.cuh for q, k, v of type bf16.
#include "gated_delta/recurrent_bwd.cuh"

void df::recurrent_bwd_bf16_cuda(const RecurrentBwdLaunch& launch, void* stream) {
  cuda::recurrent_bwd_dispatch<bf16>(launch, stream);
}
