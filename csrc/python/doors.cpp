#include "python/doors.h"

namespace df {
void door_math(DoorFn fn, bool f64, const void* x, void* y, int64_t n) {
  using namespace cpu;
  DF_CPU(door_math)(fn, f64, x, y, n);
}

void door_round_trip(bool half, const float* x, uint16_t* bits, float* y, int64_t n) {
  using namespace cpu;
  DF_CPU(door_round_trip)(half, x, bits, y, n);
}

void door_gemm(const DoorGemm& args) {
  using namespace cpu;
  DF_CPU(door_gemm)(args);
}
}  // namespace df
