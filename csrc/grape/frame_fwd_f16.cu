// frame_fwd.cuh, frame_mma.cuh and frame_channels.cuh for rows of type f16.
#include "grape/frame_channels.cuh"
#include "grape/frame_mma.cuh"

void df::frame_fwd_f16_cuda(const FrameCuda& p, void* stream) {
  if (!cuda::frame_mma_launch<f16, false>(p, stream)) cuda::frame_fwd_launch<f16>(p, stream);
}
void df::frame_channels_f16_cuda(const FrameCuda& p, bool backward, void* stream) {
  cuda::frame_channels_launch<f16>(p, backward, stream);
}
