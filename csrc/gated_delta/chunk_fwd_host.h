// Runs the forward of the chunk form on CUDA; the backward does so, too, for states not saved.
#pragma once
#include "common/cuda_shim.h"
#include "common/op.h"
#include "gated_delta/chunk_fwd_cuda.h"
#include "gated_delta/chunk_tma.h"

namespace df::cuda {
// wgmma where the device has it and TMA can load the inputs, else mma.sync.
inline void chunk_fwd_run(ChunkFwdCuda p, void* stream) {
  const ChunkCuda& in = p.in;
  const Tensor4 tensors[3] = {tma_keys(in, p.o ? in.q : in.k), tma_keys(in, in.k),
                              tma_values(in, in.v)};
  bool tma = true;
  p.vectors = true;
  for (const Tensor4& t : tensors) tma &= tma_loads(t), p.vectors &= whole_vectors(t);
  auto* const sm90 =
      in.q.dtype == DType::bf16 ? &chunk_fwd_bf16_sm90_cuda : &chunk_fwd_f16_sm90_cuda;
  if (tma && sm90 && sm() == 90) {
    const auto e = cudaError_t(sm90(p, stream));
    STD_TORCH_CHECK(e == cudaSuccess, "gated_delta: ", cudaGetErrorString(e));
    return;
  }
  switch (in.q.dtype) {
    case DType::f32: return chunk_fwd_f32_cuda(p, stream);
    case DType::bf16: return chunk_fwd_bf16_cuda(p, stream);
    default: return chunk_fwd_f16_cuda(p, stream);
  }
}
}  // namespace df::cuda
