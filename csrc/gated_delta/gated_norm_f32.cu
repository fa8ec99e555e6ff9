// gated_norm.cuh for rows of type float.
#include "gated_delta/gated_norm.cuh"

void df::row_norm_fwd_f32_cuda(const RowNormLaunch& launch, void* stream) {
  cuda::row_norm_fwd_launch<float>(launch, stream);
}
void df::row_norm_bwd_f32_cuda(const RowNormLaunch& launch, void* dweight, void* stream) {
  cuda::row_norm_bwd_launch<float>(launch, dweight, stream);
}
