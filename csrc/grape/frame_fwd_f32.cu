// frame_fwd.cuh and frame_channels.cuh for rows of type f32.
#include "grape/frame_channels.cuh"
#include "grape/frame_fwd.cuh"

void df::frame_fwd_f32_cuda(const FrameCuda& call, void* stream) {
  cuda::frame_fwd_launch<float>(call, stream);
}
void df::frame_channels_f32_cuda(const FrameCuda& call, bool backward, void* stream) {
  cuda::frame_channels_launch<float>(call, backward, stream);
}
