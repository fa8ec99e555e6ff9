// mix_kernel.cuh for elements of type f16.
#include "ddl/mix_kernel.cuh"

void df::mix_fwd_f16_cuda(const MixFwdArgs& args, const Offsets& offsets, void* stream) {
  cuda::mix_fwd_launch<f16>(args, offsets, stream);
}
void df::mix_bwd_f16_cuda(const MixBwdArgs& args, const MixSums& sums, const Offsets& offsets,
                          void* stream) {
  cuda::mix_bwd_launch<f16>(args, sums, offsets, stream);
}
