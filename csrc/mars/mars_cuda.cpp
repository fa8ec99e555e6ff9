#include "common/cuda_shim.h"
#include "mars/mars_launch.h"
#include "mars/mars_plan.h"

namespace df::cuda {
namespace {
// The device arguments that are not lists.
MarsInput number(const char* name, const OptTensor& t, const Tensor& like) {
  if (!t) return {nullptr, DType::f32};
  STD_TORCH_CHECK(
      t->numel() == 1 && t->is_cpu() == like.is_cpu() &&
          (t->scalar_type() == ScalarType::Float || t->scalar_type() == ScalarType::Double),
      "mars: ", name, " must be one float32 or float64 on the parameters' device");
  return {t->const_data_ptr(), dtype(*t)};
}

const double* doubles(const char* name, const OptTensor& t, size_t count, const Tensor& like) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Double && t->numel() == int64_t(count) &&
                      t->is_contiguous() && t->is_cpu() == like.is_cpu(),
                  "mars: ", name, " must be ", count, " contiguous float64 on the device");
  return static_cast<const double*>(t->const_data_ptr());
}

void check_device(const char* name, const Tensors& tensors, const Tensor& like) {
  for (const Tensor& t : tensors)
    STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(),
                    "mars: ", name, " must be on the device of the first parameter");
}

// Whether pieces of 4 elements (2 beside float64) can be accessed at once.
bool vectors(const MarsTensor& t, MarsMaster master) {
  const uintptr_t piece = t.p.type == DType::f64 ? 2 : 4;
  const auto fits = [&](const MarsArray& a) {
    const uintptr_t size = a.absmax ? 1 : a.type == DType::f64 ? 8 : a.type == DType::f32 ? 4 : 2;
    return reinterpret_cast<uintptr_t>(a.data) % std::min<uintptr_t>(16, piece * size) == 0;
  };
  return fits(t.p) && fits({const_cast<void*>(t.g), t.g_type}) && fits(t.h) && fits(t.m) &&
         fits(t.v) && fits(t.vmax) &&
         fits({t.master, master == MarsMaster::split16 ? DType::bf16 : DType::f32});
}

// Whether the arrays that the norm or the update looks at are those of the plain case.
bool plain(const MarsTensor& t, const MarsSection& x, bool update) {
  const auto is_float = [](const MarsArray& a) { return a.type == DType::f32 && !a.absmax; };
  if (t.p.type == DType::f64 || t.g_type != DType::f32 || !is_float(t.h)) return false;
  return !update || (x.rule == MarsRule::adamw && x.caution == MarsCaution::off &&
                     x.master == MarsMaster::none && !x.stateless && !t.vmax.data &&
                     x.write_h == x.corrected && is_float(t.p) && is_float(t.m) && is_float(t.v));
}

// The tensors of one compute type with their work list, and the table made of it.
struct Plan {
  MarsLaunch launch{};
  std::vector<MarsEntry> entries;
  std::vector<char> table;
};

void order_items(Plan& plan, bool update) {
  const auto norms = [](const MarsEntry& e) { return e.norm ? e.chunks : 0; };
  const auto counts = [](const MarsEntry& e) { return e.count ? e.chunks : 0; };
  const int tensors = int(plan.entries.size());
  const bool any = std::any_of(plan.entries.begin(), plan.entries.end(),
                               [](const MarsEntry& e) { return e.count; });
  plan.launch.tensors = tensors;
  plan.launch.lag = !update ? 0 : any ? 2 : 1;
  plan.entries.resize(tensors + plan.launch.lag);
  int64_t items = 0, parts = 0;
  for (int j = 0; j < tensors + plan.launch.lag; ++j) {
    MarsEntry& e = plan.entries[j];
    e.first = int32_t(items), e.part = int32_t(parts);
    parts += norms(e);
    items += norms(e) + (j > 0 ? counts(plan.entries[j - 1]) : 0);
    if (update && j >= plan.launch.lag) items += plan.entries[j - plan.launch.lag].chunks;
  }
  STD_TORCH_CHECK(items <= INT32_MAX, "mars: too many elements for one call");
  plan.launch.items = int32_t(items), plan.launch.parts = int32_t(parts);
}

Plan make_plan(const MarsCall& call, bool wide, bool update, bool own_norms) {
  Plan plan;
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    const MarsTensor& t = call.tensors[i];
    const MarsSection& x = call.sections[t.section];
    MarsEntry e{};
    e.tensor = t;
    if (update) e.step = call.steps[i];
    e.counts_steps = counts_steps(x);
    e.chunks = int32_t((t.n + kMarsCudaChunk - 1) / kMarsCudaChunk);
    e.norm = !update || (own_norms && x.corrected && std::isfinite(x.clip));
    e.count = update && x.caution == MarsCaution::mean && x.rule != MarsRule::given;
    e.access = !vectors(t, x.master) ? MarsAccess::single
               : plain(t, x, update) ? MarsAccess::plain
                                     : MarsAccess::vectors;
    if ((t.p.type == DType::f64) == wide) plan.entries.push_back(e);
  }
  order_items(plan, update);
  plan.launch.sections = int32_t(call.sections.size());
  const auto append = [&](const auto& list) {
    const char* bytes = reinterpret_cast<const char*>(list.data());
    plan.table.insert(plan.table.end(), bytes, bytes + list.size() * sizeof(list[0]));
  };
  append(plan.entries);
  append(call.sections);
  return plan;
}

Tensor make_workspace(const Plan& plan, const Tensor& like) {
  const int64_t table = mars_table_bytes(plan.launch);
  const int64_t bytes =
      mars_table_offset(plan.launch) + (table > kMarsTableBytes ? (table + 15) / 16 * 16 : 0);
  return empty(like, {bytes}, ScalarType::Byte);
}
}  // namespace

static void step(const MarsLists& lists, const Tensors& grads, const std::vector<int64_t>& sections,
                 const std::vector<double>& constants, const OptTensor& schedule,
                 const OptTensor& norms, const OptTensor& grad_scale, const OptTensor& found_inf,
                 int64_t seed) {
  const MarsCall call = mars_call(lists, grads, sections, constants);
  if (lists.params.empty()) return;
  const Tensor& like = lists.params[0];
  check_device("params", lists.params, like);
  check_device("absmaxes", lists.absmaxes, like);
  check_device("state_steps", lists.state_steps, like);
  for (bool wide : {false, true}) {
    Plan plan = make_plan(call, wide, true, !norms);
    if (plan.launch.tensors == 0) continue;
    plan.launch.grad_scale = number("grad_scale", grad_scale, like);
    plan.launch.found_inf = number("found_inf", found_inf, like);
    plan.launch.schedule = doubles("schedule", schedule, 3 * call.sections.size(), like);
    plan.launch.norms = doubles("norms", norms, lists.params.size(), like);
    plan.launch.seed = uint64_t(seed);
    const Tensor workspace = make_workspace(plan, like);
    plan.launch.workspace = workspace.mutable_data_ptr();
    Launch launch(workspace, lists.params, grads, lists.exp_avgs, lists.exp_avg_sqs,
                  lists.max_exp_avg_sqs, lists.last_grads, lists.masters, lists.absmaxes,
                  lists.state_steps, schedule, norms, grad_scale, found_inf);
    mars_cuda(plan.launch, plan.table.data(), wide, launch.stream());
    launch.check();
  }
}

static Tensor squares(Tensors grads, Tensors last_grads, Tensors absmaxes,
                      std::vector<int64_t> sections, std::vector<double> constants,
                      OptTensor schedule, OptTensor grad_scale) {
  STD_TORCH_CHECK(!grads.empty(), "mars_squares: no tensors");
  const MarsCall call = mars_norm_call(grads, last_grads, absmaxes, sections, constants);
  const Tensor& like = grads[0];
  check_device("grads", grads, like);
  check_device("last_grads", last_grads, like);
  check_device("absmaxes", absmaxes, like);
  const Tensor out = empty(like, {int64_t(grads.size())}, ScalarType::Double);
  for (bool wide : {false, true}) {
    Plan plan = make_plan(call, wide, false, true);
    if (plan.launch.tensors == 0) continue;
    plan.launch.grad_scale = number("grad_scale", grad_scale, like);
    plan.launch.schedule = doubles("schedule", schedule, 3 * call.sections.size(), like);
    const Tensor workspace = make_workspace(plan, like);
    plan.launch.workspace = workspace.mutable_data_ptr();
    plan.launch.squares = out.mutable_data_ptr<double>();
    Launch launch(workspace, out, grads, last_grads, absmaxes, schedule, grad_scale);
    mars_cuda(plan.launch, plan.table.data(), wide, launch.stream());
    launch.check();
  }
  return out;
}
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("mars_", TORCH_BOX((&df::mars_op<&df::cuda::step>)));
  m.impl("mars_plan", TORCH_BOX(&df::mars_plan));
  m.impl("mars_planned_", TORCH_BOX((&df::mars_planned_op<&df::cuda::step>)));
  m.impl("mars_squares", TORCH_BOX(&df::cuda::squares));
}
