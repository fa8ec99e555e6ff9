// The short convolution's kernels for x of type bf16.
#include "gated_delta/short_conv_bwd.cuh"

void df::conv_fwd_bf16_cuda(const ConvDeviceFwd& args, const Offsets& offsets, void* stream) {
  cuda::conv_fwd_launch<bf16>(args, offsets, stream);
}
void df::conv_bwd_bf16_cuda(const ConvDeviceBwd& args, const Offsets& offsets, void* stream) {
  cuda::conv_bwd_launch<bf16>(args, offsets, stream);
}
