// frame_bwd.cuh for rows of type f16.
#include "grape/frame_bwd.cuh"

void df::frame_bwd_f16_cuda(const FrameCuda& call, void* stream) {
  cuda::frame_bwd_launch<f16>(call, stream);
}
