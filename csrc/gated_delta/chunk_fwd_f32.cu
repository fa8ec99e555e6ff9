// chunk_fwd_kernel.cuh for f32 on mma.sync.
#include "gated_delta/chunk_fwd_kernel.cuh"

void df::chunk_fwd_f32_cuda(const ChunkFwdCuda& args, void* stream) {
  cuda::chunk_fwd_dispatch<cuda::Sm80, float>(args, cuda::NoMaps{}, stream);
}
