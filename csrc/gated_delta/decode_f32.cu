// decode_kernel.cuh for states of type float.
#include "gated_delta/decode_kernel.cuh"

void df::decode_f32_cuda(const DecodeArgs& args, void* stream) {
  cuda::decode_dispatch<float>(args, stream);
}
