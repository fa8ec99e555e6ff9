// frame_bwd.cuh for rows of type bf16.
#include "grape/frame_bwd.cuh"

void df::frame_bwd_bf16_cuda(const FrameCuda& call, void* stream) {
  cuda::frame_bwd_launch<bf16>(call, stream);
}
