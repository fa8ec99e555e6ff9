// The short convolution's kernels for x of type float.
#include "gated_delta/short_conv_bwd.cuh"

void df::conv_fwd_f32_cuda(const ConvDeviceFwd& args, const Offsets& offsets, void* stream) {
  cuda::conv_fwd_launch<float>(args, offsets, stream);
}
void df::conv_bwd_f32_cuda(const ConvDeviceBwd& args, const Offsets& offsets, void* stream) {
  cuda::conv_bwd_launch<float>(args, offsets, stream);
}
