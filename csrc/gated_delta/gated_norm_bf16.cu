// gated_norm.cuh for rows of type bf16.
#include "gated_delta/gated_norm.cuh"

void df::row_norm_fwd_bf16_cuda(const RowNormLaunch& launch, void* stream) {
  cuda::row_norm_fwd_launch<bf16>(launch, stream);
}
void df::row_norm_bwd_bf16_cuda(const RowNormLaunch& launch, void* dweight, void* stream) {
  cuda::row_norm_bwd_launch<bf16>(launch, dweight, stream);
}
