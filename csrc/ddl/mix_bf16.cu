// mix_kernel.cuh for elements of type bf16.
#include "ddl/mix_kernel.cuh"

void df::mix_fwd_bf16_cuda(const MixFwdArgs& args, const Offsets& offsets, void* stream) {
  cuda::mix_fwd_launch<bf16>(args, offsets, stream);
}
void df::mix_bwd_bf16_cuda(const MixBwdArgs& args, const MixSums& sums, const Offsets& offsets,
                           void* stream) {
  cuda::mix_bwd_launch<bf16>(args, sums, offsets, stream);
}
