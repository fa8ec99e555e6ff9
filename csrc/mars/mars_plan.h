// A step's tensors but the gradients, kept on this side between steps: a list of tensors that comes
// through the dispatcher costs 0.15 us a tensor, its values are read anew in every step.
#pragma once
#include <memory>

#include "mars/mars_host.h"

namespace df {
struct MarsPlan {
  static constexpr uint64_t kMagic = 0x6d6172732d706c6e;
  uint64_t magic = kMagic;
  MarsLists lists;
  std::vector<ScalarType> types;  // of params
  std::vector<int64_t> sections;
};

// The plan as the bytes of a tensor, which frees it.
inline Tensor mars_plan(Tensors params, Tensors exp_avgs, Tensors exp_avg_sqs,
                        Tensors max_exp_avg_sqs, Tensors last_grads, Tensors masters,
                        Tensors absmaxes, Tensors state_steps, std::vector<int64_t> sections) {
  auto plan = std::make_unique<MarsPlan>();
  for (const Tensor& p : params) plan->types.push_back(p.scalar_type());
  plan->lists = {std::move(params),          std::move(exp_avgs),   std::move(exp_avg_sqs),
                 std::move(max_exp_avg_sqs), std::move(last_grads), std::move(masters),
                 std::move(absmaxes),        std::move(state_steps)};
  plan->sections = std::move(sections);
  const int64_t size = sizeof(MarsPlan), stride = 1;
  return torch::stable::from_blob(plan.release(), {&size, 1}, {&stride, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Byte,
                                  [](void* data) { delete static_cast<MarsPlan*>(data); });
}

inline const MarsPlan& mars_plan_of(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu() && t.numel() == sizeof(MarsPlan), "mars: not a plan");
  const MarsPlan& plan = *static_cast<const MarsPlan*>(t.const_data_ptr());
  STD_TORCH_CHECK(plan.magic == MarsPlan::kMagic, "mars: not a plan");
  return plan;
}

// Whether the plan's step can be done with these gradients, and the parameters as they are now.
inline bool mars_fits(const MarsPlan& plan, const Tensors& grads) {
  const Tensors& params = plan.lists.params;
  if (grads.size() != params.size()) return false;
  for (size_t i = 0; i < params.size(); ++i)
    if (params[i].scalar_type() != plan.types[i] || !is_dense(params[i]) ||
        !Layout(params[i]).holds_for(grads[i]))
      return false;
  return true;
}

// The operators that a device's step(lists, grads, ...) gives.
template <auto step>
void mars_op(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
             Tensors max_exp_avg_sqs, Tensors last_grads, Tensors masters, Tensors absmaxes,
             Tensors state_steps, std::vector<int64_t> sections, std::vector<double> constants,
             OptTensor schedule, OptTensor norms, OptTensor grad_scale, OptTensor found_inf,
             int64_t seed) {
  const MarsLists lists{std::move(params),          std::move(exp_avgs),   std::move(exp_avg_sqs),
                        std::move(max_exp_avg_sqs), std::move(last_grads), std::move(masters),
                        std::move(absmaxes),        std::move(state_steps)};
  step(lists, grads, sections, constants, schedule, norms, grad_scale, found_inf, seed);
}

template <auto step>
bool mars_planned_op(Tensors grads, Tensor plan, std::vector<double> constants, OptTensor schedule,
                     OptTensor grad_scale, OptTensor found_inf, int64_t seed) {
  const MarsPlan& known = mars_plan_of(plan);
  if (!mars_fits(known, grads)) return false;
  step(known.lists, grads, known.sections, constants, schedule, {}, grad_scale, found_inf, seed);
  return true;
}
}  // namespace df
