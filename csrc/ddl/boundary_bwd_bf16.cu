// boundary_bwd.cuh for states of type bfloat16.
#include "ddl/boundary_bwd.cuh"

df::BoundaryPlan df::boundary_bwd_plan_bf16_cuda(const BoundaryGrads& grads) {
  return cuda::boundary_bwd_plan_of<bf16>(grads);
}
void df::boundary_bwd_bf16_cuda(const BoundaryGrads& grads, const BoundaryPlan& plan,
                                float* partials, void* stream) {
  cuda::boundary_bwd_dispatch<bf16>(grads, plan, partials, stream);
}
