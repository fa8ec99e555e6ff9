// Test doors: parts of common/ that no operator exposes, reached through deltafuse._C.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"

namespace df {
enum class DoorFn { exp, log, sigmoid, silu, softplus };

// y[i] = fn(x[i]) with the vector functions of the current instruction set, float32 or float64.
DF_EXPORT void door_math(DoorFn fn, bool f64, const void* x, void* y, int64_t n);
// y = x converted to bfloat16 (or float16) and back.
DF_EXPORT void door_round_trip(bool half, const float* x, uint16_t* bits, float* y, int64_t n);

struct DoorGemm {
  const void *a, *b;
  void* c;
  int64_t m, n, k;
  int shape;  // 0 full, 1 lower, 2 upper
  bool f64, transposed, add;
};
DF_EXPORT void door_gemm(const DoorGemm& args);

namespace cpu {
DF_DECLARE_CPU(door_math, DoorFn, bool f64, const void* x, void* y, int64_t n)
DF_DECLARE_CPU(door_round_trip, bool half, const float* x, uint16_t* bits, float* y, int64_t n)
DF_DECLARE_CPU(door_gemm, const DoorGemm& args)
}  // namespace cpu
}  // namespace df
