// recurrent_fwd.cuh for q, k, v of type f16.
#include "gated_delta/recurrent_fwd.cuh"

void df::recurrent_fwd_f16_cuda(const RecurrentFwdArgs& args, const Offsets& offsets,
                                void* stream) {
  cuda::recurrent_fwd_dispatch<f16>(args, offsets, stream);
}
