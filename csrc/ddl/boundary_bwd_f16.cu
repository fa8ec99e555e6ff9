// boundary_bwd.cuh for states of type float16.
#include "ddl/boundary_bwd.cuh"

df::BoundaryPlan df::boundary_bwd_plan_f16_cuda(const BoundaryGrads& grads) {
  return cuda::boundary_bwd_plan_of<f16>(grads);
}
void df::boundary_bwd_f16_cuda(const BoundaryGrads& grads, const BoundaryPlan& plan,
                               float* partials, void* stream) {
  cuda::boundary_bwd_dispatch<f16>(grads, plan, partials, stream);
}
