// mars_kernel.cuh for both compute types.
#include "mars/mars_kernel.cuh"

void df::mars_cuda(const MarsLaunch& x, const void* table, bool wide, void* stream) {
  wide ? cuda::mars_launch<double>(x, table, stream) : cuda::mars_launch<float>(x, table, stream);
}
