// product_async.cuh for matrices of type f16.
#include "mars/product_async.cuh"

void df::product_f16_sm90_cuda(const Product& p, const CUtensorMap& left, const CUtensorMap& right,
                               void* stream) {
  cuda::product_async_launch<f16>(p, left, right, stream);
}
