// Tensor maps for TMA, made on the host through the driver's entry point: nothing links libcuda.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "common/dtype.h"

namespace df {
// A 4-dimensional tensor of 16-bit elements, innermost dimension first; stride[i] is that of
// dimension i + 1 in elements. Boxes of 64 x 1 x rows x 1 elements arrive as panels of a tile
// (tile.cuh). What lies outside arrives as zeros.
struct Tensor4 {
  const void* data;
  DType dtype;
  int64_t size[4], stride[3];
};

// Whether TMA can address it: a base and strides of whole 16 bytes.
inline bool has_tensor_map(const Tensor4& x) {
  bool whole = reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int64_t stride : x.stride) whole &= stride % 8 == 0 && stride < int64_t(1) << 39;
  for (int64_t size : x.size) whole &= size < int64_t(1) << 31;
  return whole;
}

// The driver needs a context, which a thread has not got before its first call that sets one: a
// backward's thread may have got its memory from a cache.
inline cudaError_t have_context() {
  int device = 0;
  const cudaError_t e = cudaGetDevice(&device);
  return e == cudaSuccess ? cudaSetDevice(device) : e;
}

inline cudaError_t make_tensor_map(CUtensorMap* map, const Tensor4& x, int rows) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  cudaError_t e = have_context();
  if (e != cudaSuccess) return e;
  e = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                       &found);
  if (e != cudaSuccess) return e;
  if (found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
  cuuint64_t size[4], bytes[3];
  for (int i = 0; i < 4; ++i) size[i] = cuuint64_t(x.size[i]);
  for (int i = 0; i < 3; ++i) bytes[i] = cuuint64_t(x.stride[i]) * 2;
  const cuuint32_t box[4] = {64, 1, cuuint32_t(rows), 1}, step[4] = {1, 1, 1, 1};
  const auto type =
      x.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  const CUresult r = encode(map, type, 4, const_cast<void*>(x.data), size, bytes, box, step,
                            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                            CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return r == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}
}  // namespace df
