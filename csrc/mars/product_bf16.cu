// product_kernel.cuh for matrices of type bf16.
#include "mars/product_kernel.cuh"

void df::product_bf16_cuda(const Product& p, void* stream) {
  cuda::product_launch<bf16>(p, stream);
}
