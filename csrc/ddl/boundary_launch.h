// Between the host and the CUDA kernels of the boundary: how a launch is laid out, and the
// launchers by the type of the state. Knows neither torch nor CUDA.
#pragma once
#include "ddl/boundary.h"

namespace df {
// A group of warps works on one token; a CTA has several groups, which share the weights. Offsets
// are bytes in shared memory; -1: not there.
struct BoundaryPlan {
  int warps, groups, stages;  // warps of a group; tokens ahead of the one in work, and itself
  int items;                  // what a thread takes at once; a token has so many
  int part, parts;            // items of a token that shared memory holds; 1 part: all of them
  int read, W_v, norm, W_beta;
  int sum_read, sum_W_v, sum_norm, sum_W_beta;  // backward: their gradients
  int base, group_bytes;                        // the groups' own memory
  int stage_bytes, table;                       // table, reductions and x: from a group's base
  int reduction, x;
  int64_t bytes, grid;
};

// Sums over the tokens for the gradients of the weights, in the compute type; absent ones are 0
// wide.
struct BoundarySums {
  int64_t read, norm, W_v, b_v, W_beta, b_beta, total;  // where each one begins

  BoundarySums(const BoundaryArgs& p, bool read_wanted, bool norm_wanted) {
    int64_t at = 0;
    const auto take = [&at](int64_t size) {
      const int64_t begin = at;
      at += size;
      return begin;
    };
    read = take(read_wanted ? p.d * p.d_v : 0);
    norm = take(norm_wanted ? p.d : 0);
    W_v = take(p.W_v.data ? p.d_v * p.d : 0);
    b_v = take(p.W_v.data ? p.d_v : 0);
    W_beta = take(p.W_beta.data ? p.d : 0);
    b_beta = take(p.W_beta.data ? 1 : 0);
    total = at;
  }
};

bool boundary_fwd_f32_cuda(const BoundaryArgs& p, void* stream);
bool boundary_fwd_bf16_cuda(const BoundaryArgs& p, void* stream);
bool boundary_fwd_f16_cuda(const BoundaryArgs& p, void* stream);

// partials [plan.grid, boundary_partial_stride], null if no weight's gradient is wanted
constexpr int64_t boundary_partial_stride(const BoundarySums& sums) {  // whole sectors
  return (sums.total + 31) / 32 * 32;
}
BoundaryPlan boundary_bwd_plan_f32_cuda(const BoundaryGrads& p);
BoundaryPlan boundary_bwd_plan_bf16_cuda(const BoundaryGrads& p);
BoundaryPlan boundary_bwd_plan_f16_cuda(const BoundaryGrads& p);
void boundary_bwd_f32_cuda(const BoundaryGrads& p, const BoundaryPlan& plan, float* partials,
                           void* stream);
void boundary_bwd_bf16_cuda(const BoundaryGrads& p, const BoundaryPlan& plan, float* partials,
                            void* stream);
void boundary_bwd_f16_cuda(const BoundaryGrads& p, const BoundaryPlan& plan, float* partials,
                           void* stream);

// Columns [begin, begin + size) of the partial sums become a gradient.
struct BoundaryGradient {
  void* data;
  DType type;
  int64_t begin, size;
};
constexpr int kBoundaryGradients = 6;
struct BoundaryFinish {
  const float* partials;
  int64_t rows, stride, total;
  BoundaryGradient grads[kBoundaryGradients];  // in the order of their columns; null: not wanted
};
void boundary_finish_cuda(const BoundaryFinish& p, void* stream);
}  // namespace df
