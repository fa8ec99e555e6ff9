// gated_norm.cuh for rows of type f16.
#include "gated_delta/gated_norm.cuh"

void df::row_norm_fwd_f16_cuda(const RowNormLaunch& launch, void* stream) {
  cuda::row_norm_fwd_launch<f16>(launch, stream);
}
void df::row_norm_bwd_f16_cuda(const RowNormLaunch& launch, void* dweight, void* stream) {
  cuda::row_norm_bwd_launch<f16>(launch, dweight, stream);
}
