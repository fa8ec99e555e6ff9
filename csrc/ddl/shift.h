// The seam of the token shift, y_t = p_t x_{t-1} + c_t x_t for every head:
//   x, y [B,T,H,D]; p, c [B,T,H]; the token before a sequence is its cache [N,H,D], or zero.
#pragma once
#include "common/dtype.h"
#include "common/isa.h"
#include "common/sequences.h"

namespace df {
struct ShiftHeads {  // [B,T,H] or [B,T,H,D] with unit stride of D; strides in elements
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t b = 0, t = 0, h = 0;
};

struct ShiftShape {
  int64_t B, T, N, H, D;
};

struct ShiftFwdArgs {
  ShiftShape shape;
  ShiftHeads x, previous, current;
  const void* cache;  // in x's dtype; may be null, as the last token's place
  void *y, *last;     // contiguous
};

struct ShiftBwdArgs {
  ShiftShape shape;
  ShiftHeads x, previous, current, dy;
  const void* cache;
  const void* d_last;  // compute type, as d_cache; may be null
  void *dx, *d_cache;
  void *d_previous, *d_current;  // [B,T,H], compute type
};

// CUDA: float32, bfloat16 and float16.
void shift_fwd_cuda(const ShiftFwdArgs& args, const Offsets& offsets, void* stream);
void shift_bwd_cuda(const ShiftBwdArgs& args, const Offsets& offsets, void* stream);

namespace cpu {
struct ShiftTile {  // tokens [begin, end) of a row, which are of sequence n = tokens [first, last)
  int64_t n, batch, first, last, begin, end;
};
constexpr int64_t kShiftTile = 16;
// p and c are in the compute type. An empty tile passes a state's gradient on.
DF_DECLARE_CPU(shift_fwd, const ShiftFwdArgs&, const ShiftTile&)
DF_DECLARE_CPU(shift_bwd, const ShiftBwdArgs&, const ShiftTile&)
}  // namespace cpu
}  // namespace df
