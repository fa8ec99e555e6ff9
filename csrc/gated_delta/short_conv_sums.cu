// The gradients of the taps and the bias from the partial sums of the chunks.
#include "gated_delta/short_conv_bwd.cuh"

void df::conv_sums_cuda(const ConvDeviceBwd& p, void* stream) {
  cuda::column_sums(p.partial, p.in.chunks(true), (p.in.W + 1) * p.in.D, cuda::ConvSums{p},
                    static_cast<cudaStream_t>(stream));
}
