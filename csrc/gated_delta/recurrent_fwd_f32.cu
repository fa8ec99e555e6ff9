// recurrent_fwd.cuh for q, k, v of type float.
#include "gated_delta/recurrent_fwd.cuh"

void df::recurrent_fwd_f32_cuda(const RecurrentFwdArgs& args, const Offsets& offsets,
                                void* stream) {
  cuda::recurrent_fwd_dispatch<float>(args, offsets, stream);
}
