// chunk_fwd_kernel.cuh for bf16 on mma.sync.
#include "gated_delta/chunk_fwd_kernel.cuh"

void df::chunk_fwd_bf16_cuda(const ChunkFwdCuda& args, void* stream) {
  cuda::chunk_fwd_dispatch<cuda::Sm80, bf16>(args, cuda::NoMaps{}, stream);
}
