// mix_kernel.cuh for elements of type float.
#include "ddl/mix_kernel.cuh"

void df::mix_fwd_f32_cuda(const MixFwdArgs& args, const Offsets& offsets, void* stream) {
  cuda::mix_fwd_launch<float>(args, offsets, stream);
}
void df::mix_bwd_f32_cuda(const MixBwdArgs& args, const MixSums& sums, const Offsets& offsets,
                          void* stream) {
  cuda::mix_bwd_launch<float>(args, sums, offsets, stream);
}
