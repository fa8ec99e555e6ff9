// rotary_kernel.cuh and rotary_grads.cuh for elements of type bf16.
#include "grape/rotary_grads.cuh"

void df::rotary_bf16_cuda(const RotaryLaunch& x, bool grads, void* stream) {
  cuda::rotary_dispatch<bf16>(x, grads, stream);
}
