// rotary_kernel.cuh and rotary_grads.cuh for elements of type float.
#include "grape/rotary_grads.cuh"

void df::rotary_f32_cuda(const RotaryLaunch& x, bool grads, void* stream) {
  cuda::rotary_dispatch<float>(x, grads, stream);
}
