// boundary_bwd.cuh for states of type float.
#include "ddl/boundary_bwd.cuh"

df::BoundaryPlan df::boundary_bwd_plan_f32_cuda(const BoundaryGrads& grads) {
  return cuda::boundary_bwd_plan_of<float>(grads);
}
void df::boundary_bwd_f32_cuda(const BoundaryGrads& grads, const BoundaryPlan& plan,
                               float* partials, void* stream) {
  cuda::boundary_bwd_dispatch<float>(grads, plan, partials, stream);
}
