// decode_kernel.cuh for states of type bf16.
#include "gated_delta/decode_kernel.cuh"

void df::decode_bf16_cuda(const DecodeArgs& args, void* stream) {
  cuda::decode_dispatch<bf16>(args, stream);
}
