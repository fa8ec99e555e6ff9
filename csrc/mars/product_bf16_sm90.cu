// product_async.cuh for matrices of type bf16.
#include "mars/product_async.cuh"

void df::product_bf16_sm90_cuda(const Product& p, const CUtensorMap& left, const CUtensorMap& right,
                                void* stream) {
  cuda::product_async_launch<bf16>(p, left, right, stream);
}
