// frame_bwd.cuh for rows of type f32.
#include "grape/frame_bwd.cuh"

void df::frame_bwd_f32_cuda(const FrameCuda& call, void* stream) {
  cuda::frame_bwd_launch<float>(call, stream);
}
