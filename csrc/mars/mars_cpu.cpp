// The whole list in one call. Tensors are taken in windows: norm chunks of the window, then its
// update chunks in reverse order, so that the second read of g and h finds what the first one left
// in the cache. A partial sum belongs to a chunk, not to a thread: the bits of a result depend
// neither on the thread count nor on what else is in the list.
#include <atomic>

#include "mars/mars_plan.h"

namespace df {
using namespace cpu;
namespace {
constexpr int64_t kWindow = 1 << 20;  // elements; g and h of a window are 8 MB in fp32
constexpr int64_t kLeastWork = 1 << 13;

double value_of(const Tensor& t, int64_t i = 0) {
  STD_TORCH_CHECK(t.is_cpu() && t.numel() > i, "mars: scalar tensors must be on the CPU");
  switch (t.scalar_type()) {
    case ScalarType::Float: return static_cast<const float*>(t.const_data_ptr())[i];
    case ScalarType::Double: return static_cast<const double*>(t.const_data_ptr())[i];
    default: STD_TORCH_CHECK(false, "mars: scalar tensors must be float32 or float64");
  }
}

struct Item {
  uint32_t tensor;
  int64_t begin, end;
};

// Threads draw the items one by one: nobody waits for a thread that lost its core. Fewer elements
// than a thread does in about ten microseconds wake no other one.
template <class Fn>
void run(const std::vector<Item>& list, const Fn& fn) {
  std::atomic<size_t> next{0};
  const size_t items = list.size();
  int64_t elements = 0;
  for (const Item& item : list) elements += item.end - item.begin;
  const int64_t threads = std::min(
      {int64_t(torch::stable::get_num_threads()), int64_t(items), 1 + elements / kLeastWork});
  parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread)
      for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) fn(i);
  });
}

// A call, and the scalars of each of its tensors.
struct Work {
  MarsCall call;
  std::vector<MarsScalars> scalars;
  const MarsSection& section(size_t i) const { return call.sections[call.tensors[i].section]; }
};

std::vector<Item> chunks(const Work& work, size_t begin, size_t end) {
  std::vector<Item> items;
  for (size_t i = begin; i < end; ++i)
    for (int64_t at = 0, n = work.call.tensors[i].n; at < n; at += kMarsChunk)
      items.push_back({uint32_t(i), at, std::min(at + kMarsChunk, n)});
  return items;
}

// Sums over the items of those tensors that `wanted` holds for; `part` gives one item's.
template <class Wanted, class Part>
void reduce(const std::vector<Item>& items, Wanted wanted, Part part, std::vector<double>& sums) {
  std::vector<double> parts(items.size());
  run(items, [&](size_t i) {
    if (wanted(items[i].tensor)) part(items[i], &parts[i]);
  });
  for (size_t i = 0; i < items.size(); ++i) sums[items[i].tensor] += parts[i];
}

template <class Wanted>
bool any_tensor(size_t begin, size_t end, Wanted wanted) {
  for (size_t i = begin; i < end; ++i)
    if (wanted(i)) return true;
  return false;
}

template <class Wanted>
void square_norms(const Work& work, const std::vector<Item>& items, Wanted wanted,
                  std::vector<double>& sums) {
  const auto kernel = DF_CPU(mars_norm);
  reduce(
      items, wanted,
      [&](const Item& item, double* sum) {
        kernel(work.call.tensors[item.tensor], work.scalars[item.tensor], item.begin, item.end,
               sum);
      },
      sums);
}

void set_clips(Work& work, const std::vector<Item>& items, size_t begin, size_t end,
               const OptTensor& norms) {
  const auto clipped = [&](size_t i) {
    return work.section(i).corrected && std::isfinite(work.section(i).clip);
  };
  std::vector<double> sums(work.call.tensors.size());
  if (!norms && any_tensor(begin, end, clipped)) square_norms(work, items, clipped, sums);
  for (size_t i = begin; i < end; ++i)
    if (clipped(i))
      work.scalars[i].clip = mars_clip(norms ? value_of(*norms, int64_t(i)) : std::sqrt(sums[i]),
                                       work.section(i).clip);
}

void set_caution(Work& work, const std::vector<Item>& items, size_t begin, size_t end) {
  const auto mean = [&](size_t i) { return work.section(i).caution == MarsCaution::mean; };
  if (!any_tensor(begin, end, mean)) return;
  std::vector<double> counts(work.call.tensors.size());
  const auto kernel = DF_CPU(mars_agreement);
  reduce(
      items, mean,
      [&](const Item& item, double* count) {
        const size_t i = item.tensor;
        kernel(work.call.tensors[i], work.section(i), work.scalars[i], item.begin, item.end, count);
      },
      counts);
  for (size_t i = begin; i < end; ++i)
    if (mean(i))
      work.scalars[i].caution_scale =
          1 / std::max(counts[i] / double(work.call.tensors[i].n), kMarsMinAgreement);
}

size_t window_end(const std::vector<MarsTensor>& list, size_t begin) {
  int64_t elements = 0;
  size_t end = begin;
  while (end < list.size() && (end == begin || elements + list[end].n <= kWindow))
    elements += list[end++].n;
  return end;
}

void update(Work& work, const OptTensor& norms, const std::vector<MarsRandom>& random) {
  const std::vector<MarsTensor>& tensors = work.call.tensors;
  const auto kernel = DF_CPU(mars_update);
  for (size_t begin = 0, end; begin < tensors.size(); begin = end) {
    end = window_end(tensors, begin);
    const std::vector<Item> items = chunks(work, begin, end);
    set_clips(work, items, begin, end, norms);
    set_caution(work, items, begin, end);
    run(items, [&](size_t i) {
      const Item& item = items[items.size() - 1 - i];
      const size_t k = item.tensor;
      kernel(tensors[k], work.section(k), work.scalars[k], random[k], item.begin, item.end);
    });
  }
}

MarsScalars scalars_of(const MarsSection& x, size_t index, double step, const OptTensor& schedule,
                       double grad_scale) {
  const auto number = [&](int64_t i, double otherwise) {
    return schedule ? value_of(*schedule, int64_t(index) * 3 + i) : otherwise;
  };
  return mars_scalars(x, number(0, x.lr), number(1, x.weight_decay), number(2, x.gamma), step,
                      grad_scale);
}
}  // namespace

// Scalars and random keys of every tensor of the call; the step counts are not written yet.
static std::vector<MarsRandom> prepare(Work& work, const OptTensor& schedule, double scale,
                                       uint64_t seed) {
  std::vector<MarsRandom> random;
  const std::vector<MarsTensor>& tensors = work.call.tensors;
  work.scalars.reserve(tensors.size()), random.reserve(tensors.size());
  for (size_t i = 0; i < tensors.size(); ++i) {
    const MarsSection& x = work.section(i);
    const double before = work.call.steps[i] ? *work.call.steps[i] : 0;
    const double step = std::min(before + (counts_steps(x) ? 1 : 0), kMarsMaxStep);
    const bool same = i > 0 && tensors[i].section == tensors[i - 1].section &&
                      uint32_t(step) == random.back().step;
    random.push_back({seed, uint32_t(step)});
    work.scalars.push_back(same ? work.scalars.back()
                                : scalars_of(x, tensors[i].section, step, schedule, scale));
  }
  return random;
}

static void step(const MarsLists& lists, const Tensors& grads, const std::vector<int64_t>& sections,
                 const std::vector<double>& constants, const OptTensor& schedule,
                 const OptTensor& norms, const OptTensor& grad_scale, const OptTensor& found_inf,
                 int64_t seed) {
  if (found_inf && value_of(*found_inf) != 0) return;
  Work work{mars_call(lists, grads, sections, constants), {}};
  STD_TORCH_CHECK(lists.params.empty() || lists.params[0].is_cpu(),
                  "mars: params must be on the CPU");
  for (const Tensor& t : lists.state_steps)
    STD_TORCH_CHECK(t.is_cpu(), "mars: state_steps must be on the CPU");
  const double scale = grad_scale ? value_of(*grad_scale) : 1;
  const std::vector<MarsRandom> random = prepare(work, schedule, scale, uint64_t(seed));
  // nothing is changed before every tensor has been checked
  for (size_t i = 0; i < random.size(); ++i)
    if (counts_steps(work.section(i))) *work.call.steps[i] = float(random[i].step);
  update(work, norms, random);
}

static Tensor squares(Tensors grads, Tensors last_grads, Tensors absmaxes,
                      std::vector<int64_t> sections, std::vector<double> constants,
                      OptTensor schedule, OptTensor grad_scale) {
  STD_TORCH_CHECK(!grads.empty(), "mars_squares: no tensors");
  Work work{mars_norm_call(grads, last_grads, absmaxes, sections, constants), {}};
  const double scale = grad_scale ? value_of(*grad_scale) : 1;
  for (const MarsTensor& t : work.call.tensors)
    work.scalars.push_back(
        scalars_of(work.call.sections[t.section], t.section, 1, schedule, scale));
  std::vector<double> sums(grads.size());
  square_norms(work, chunks(work, 0, grads.size()), [](size_t) { return true; }, sums);
  Tensor out = empty(grads[0], {int64_t(sums.size())}, ScalarType::Double);
  std::copy(sums.begin(), sums.end(), static_cast<double*>(out.mutable_data_ptr()));
  return out;
}
}  // namespace df

DF_IMPL(CPU, m) {
  m.impl("mars_", TORCH_BOX((&df::mars_op<&df::step>)));
  m.impl("mars_plan", TORCH_BOX(&df::mars_plan));
  m.impl("mars_planned_", TORCH_BOX((&df::mars_planned_op<&df::step>)));
  m.impl("mars_squares", TORCH_BOX(&df::squares));
}
