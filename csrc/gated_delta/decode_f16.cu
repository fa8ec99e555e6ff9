// decode_kernel.cuh for states of type f16.
#include "gated_delta/decode_kernel.cuh"

void df::decode_f16_cuda(const DecodeArgs& args, void* stream) {
  cuda::decode_dispatch<f16>(args, stream);
}
