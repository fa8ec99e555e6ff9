// The short convolution's kernels for x of type f16.
#include "gated_delta/short_conv_bwd.cuh"

void df::conv_fwd_f16_cuda(const ConvDeviceFwd& args, const Offsets& offsets, void* stream) {
  cuda::conv_fwd_launch<f16>(args, offsets, stream);
}
void df::conv_bwd_f16_cuda(const ConvDeviceBwd& args, const Offsets& offsets, void* stream) {
  cuda::conv_bwd_launch<f16>(args, offsets, stream);
}
