// recurrent_fwd.cuh for q, k, v of type bf16.
#include "gated_delta/recurrent_fwd.cuh"

void df::recurrent_fwd_bf16_cuda(const RecurrentFwdArgs& args, const Offsets& offsets,
                                 void* stream) {
  cuda::recurrent_fwd_dispatch<bf16>(args, offsets, stream);
}
