// chunk_fwd_kernel.cuh for f16 on mma.sync.
#include "gated_delta/chunk_fwd_kernel.cuh"

void df::chunk_fwd_f16_cuda(const ChunkFwdCuda& args, void* stream) {
  cuda::chunk_fwd_dispatch<cuda::Sm80, f16>(args, cuda::NoMaps{}, stream);
}
