// What a host function needs around its kernels, over the CUDA part of torch's C shim: a `Launch`,
// made of every tensor that the kernels touch, gives the stream and afterwards checks for errors.
#pragma once
#include <cuda_runtime.h>

#ifdef DF_EMULATED
#include <vector>

#include "common/op.h"
extern "C" void cuemu_register(const void* p, size_t bytes);
extern "C" void cuemu_unregister(const void* p);
#else
#define USE_CUDA 1  // before the first torch header: this file is included before op.h
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include "common/op.h"
// Only a CUDA build of libtorch has these; weak, so that the library loads with any torch.
#pragma weak aoti_torch_get_current_cuda_stream
#pragma weak torch_c10_cuda_check_msg
#pragma weak torch_c10_cuda_free_error_msg
#endif

namespace df {
#ifdef DF_EMULATED
class Launch {  // null stream; announces the tensors, so that CUEMU_STRICT=1 knows their bounds
 public:
  template <class... Tensors>
  explicit Launch(const Tensors&... t) {
    (add(t), ...);
  }
  ~Launch() {
    for (const void* p : known_) cuemu_unregister(p);
  }
  void* stream() const { return nullptr; }
  void check() const {
    const cudaError_t e = cudaGetLastError();
    STD_TORCH_CHECK(e == cudaSuccess, "CUDA error (emulated): ", cudaGetErrorString(e));
  }

 private:
  void add(const Tensor& t) {
    if (t.numel() == 0) return;
    int64_t last = 0;  // of a strided view: what it reaches
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    cuemu_register(t.const_data_ptr(), (last + 1) * t.element_size());
    known_.push_back(t.const_data_ptr());
  }
  void add(const OptTensor& t) {
    if (t) add(*t);
  }
  void add(const std::vector<Tensor>& list) {
    for (const Tensor& t : list) add(t);
  }
  std::vector<const void*> known_;
};
#else
class Launch {
 public:
  template <class... Tensors>  // Tensor, OptTensor, lists of tensors
  explicit Launch(const Tensor& first, const Tensors&...) : guard_(first.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(first.get_device_index(), &stream_));
  }
  void* stream() const { return stream_; }
  void check() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};
#endif

inline int sm() {  // 10 * major + minor of the current device
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}
}  // namespace df
