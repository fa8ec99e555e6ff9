// product_kernel.cuh for matrices of type f16.
#include "mars/product_kernel.cuh"

void df::product_f16_cuda(const Product& p, void* stream) {
  cuda::product_launch<f16>(p, stream);
}
