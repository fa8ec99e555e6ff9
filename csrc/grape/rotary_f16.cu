// rotary_kernel.cuh and rotary_grads.cuh for elements of type f16.
#include "grape/rotary_grads.cuh"

void df::rotary_f16_cuda(const RotaryLaunch& x, bool grads, void* stream) {
  cuda::rotary_dispatch<f16>(x, grads, stream);
}
