// The whole list in one call. Tensors are taken in windows: norm chunks of the window, then its
// update chunks in reverse order, so that the second read of g and h finds what the first one left
// in the cache. A partial sum belongs to a chunk, not to a thread: the bits of a result depend
// neither on the thread count nor on what else is in the list.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "common/op.h"
#include "mars/mars.h"

namespace df {
using namespace cpu;
namespace {
using Tensors = std::vector<Tensor>;
constexpr int64_t kWindow = 1 << 20;  // elements; g and h of a window are 8 MB in fp32
constexpr int64_t kLeastWork = 1 << 13;
constexpr double kMaxStep = 1 << 24;  // float32 counts no further
constexpr double kMinAgreement = 1e-3;

struct Hyper {
  double beta1, beta2, eps, lr, weight_decay, gamma;
  double s() const { return gamma * beta1 / (1 - beta1); }
};

double value_of(const Tensor& t, int64_t i = 0) {
  STD_TORCH_CHECK(t.is_cpu() && t.numel() > i, "mars: scalar tensors must be on the CPU");
  switch (t.scalar_type()) {
    case ScalarType::Float: return t.const_data_ptr<float>()[i];
    case ScalarType::Double: return t.const_data_ptr<double>()[i];
    default: STD_TORCH_CHECK(false, "mars: scalar tensors must be float32 or float64");
  }
}

bool dense(const Tensor& t) {  // some order of the dimensions is contiguous
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t i = 0; i < t.dim(); ++i) dims.emplace_back(t.stride(i), t.size(i));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (auto [stride, size] : dims) {
    if (size != 1 && stride != expected) return false;
    expected *= size;
  }
  return true;
}

// `t` is walked linearly beside `p`.
void check_layout(const char* name, size_t i, const Tensor& t, const Tensor& p) {
  bool same = t.is_cpu() && t.dim() == p.dim();
  for (int64_t d = 0; same && d < p.dim(); ++d)
    same = t.size(d) == p.size(d) && (p.size(d) == 1 || t.stride(d) == p.stride(d));
  STD_TORCH_CHECK(same || (t.numel() == 0 && p.numel() == 0), "mars: ", name, "[", i,
                  "] must have the shape and strides of params[", i, "]");
}

void* state(const char* name, const Tensors& list, size_t i, const Tensor& p) {
  check_layout(name, i, list[i], p);
  STD_TORCH_CHECK(list[i].scalar_type() == compute_type(p), "mars: ", name, "[", i,
                  "] must be float32, or float64 for a float64 parameter");
  return list[i].data_ptr();
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

std::vector<Item> chunks(const std::vector<MarsTensor>& list, size_t begin, size_t end) {
  std::vector<Item> items;
  for (size_t i = begin; i < end; ++i)
    for (int64_t at = 0; at < list[i].n; at += kMarsChunk)
      items.push_back({uint32_t(i), at, std::min(at + kMarsChunk, list[i].n)});
  return items;
}

// Per-tensor sums over the items of matrix-path tensors; `part` is a kernel with one result.
template <class Kernel>
void reduce(const std::vector<MarsTensor>& list, const std::vector<Item>& items, Kernel part,
            std::vector<double>& sums) {
  std::vector<double> parts(items.size());
  run(items, [&](size_t i) {
    const MarsTensor& t = list[items[i].tensor];
    if (t.h) part(t, items[i].begin, items[i].end, &parts[i]);
  });
  for (size_t i = 0; i < items.size(); ++i) sums[items[i].tensor] += parts[i];
}

size_t window_end(const std::vector<MarsTensor>& list, size_t begin) {
  int64_t elements = 0;
  size_t end = begin;
  while (end < list.size() && (end == begin || elements + list[end].n <= kWindow))
    elements += list[end++].n;
  return end;
}

MarsTensor gradient(size_t i, const Tensor& g, const Tensor* h) {
  MarsTensor t{};
  t.g = g.const_data_ptr();
  t.n = g.numel();
  t.g_type = dtype(g);
  if (h == nullptr) return t;
  check_layout("last_grads", i, *h, g);
  t.h = h->data_ptr();
  t.h_type = dtype(*h);
  return t;
}
}  // namespace

static Tensor norms(Tensors grads, Tensors last_grads, double beta1, double gamma, bool maximize,
                    bool negate_last_grad, OptTensor schedule, OptTensor grad_scale) {
  STD_TORCH_CHECK(!grads.empty() && grads.size() == last_grads.size(),
                  "mars_norm: needs as many last_grads as grads, and at least one");
  const Hyper hyper{beta1, 0, 0, 0, 0, schedule ? value_of(*schedule, 4) : gamma};
  std::vector<MarsTensor> list;
  for (size_t i = 0; i < grads.size(); ++i) {
    MarsTensor t = gradient(i, grads[i], &last_grads[i]);
    t.p_type = compute_type(grads[i]) == ScalarType::Double ? DType::f64 : DType::f32;
    t.grad_scale = (maximize ? -1 : 1) / (grad_scale ? value_of(*grad_scale) : 1);
    t.a = 1 + hyper.s();
    t.b = negate_last_grad ? -hyper.s() : hyper.s();
    list.push_back(t);
  }
  std::vector<double> sums(list.size());
  reduce(list, chunks(list, 0, list.size()), DF_CPU(mars_norm), sums);
  Tensor out = empty(grads[0], {int64_t(sums.size())}, ScalarType::Double);
  for (size_t i = 0; i < sums.size(); ++i) out.mutable_data_ptr<double>()[i] = std::sqrt(sums[i]);
  return out;
}

namespace {
struct Options {
  Hyper matrix, vector;
  std::optional<double> clip, norm;
  MarsCaution caution;
  double grad_scale, h_sign;
  bool write_h;
};

MarsTensor constants(MarsTensor t, const Options& o, double step) {
  const Hyper& hyper = t.h ? o.matrix : o.vector;
  t.write_h = o.write_h;
  t.cautious = t.h && o.caution != MarsCaution::off;
  t.grad_scale = o.grad_scale;
  t.a = 1 + hyper.s();
  t.b = hyper.s() * o.h_sign;
  t.clip = t.caution_scale = 1;
  t.beta1 = hyper.beta1;
  t.beta2 = hyper.beta2;
  t.eps = hyper.eps;
  t.decay = hyper.lr * hyper.weight_decay;
  // 1 - beta^step without cancellation
  t.step_size = hyper.lr / -std::expm1(step * std::log(hyper.beta1));
  t.rsqrt_bias2 = 1 / std::sqrt(-std::expm1(step * std::log(hyper.beta2)));
  return t;
}

void advance(const Tensor& step, double value) {
  if (step.scalar_type() == ScalarType::Double)
    *step.mutable_data_ptr<double>() = value;
  else
    *step.mutable_data_ptr<float>() = float(value);
}

void clip_window(std::vector<MarsTensor>& list, const std::vector<Item>& items, size_t begin,
                 size_t end, const Options& o, std::vector<double>& sums) {
  if (!o.clip) return;
  if (!o.norm) reduce(list, items, DF_CPU(mars_norm), sums);
  for (size_t i = begin; i < end; ++i) {
    const double norm = o.norm ? *o.norm : std::sqrt(sums[i]);
    // not std::max: NaN has to reach the tensor
    if (list[i].h && !(norm <= *o.clip)) list[i].clip = *o.clip / norm;
  }
}

void update(std::vector<MarsTensor>& list, const Options& o) {
  std::vector<double> sums(list.size()), agreeing(list.size());
  const auto step = DF_CPU(mars_update);
  for (size_t begin = 0, end; begin < list.size(); begin = end) {
    end = window_end(list, begin);
    const std::vector<Item> items = chunks(list, begin, end);
    clip_window(list, items, begin, end, o, sums);
    if (o.caution == MarsCaution::mean) {
      reduce(list, items, DF_CPU(mars_agreement), agreeing);
      for (size_t i = begin; i < end; ++i)
        list[i].caution_scale = 1 / std::max(agreeing[i] / double(list[i].n), kMinAgreement);
    }
    run(items, [&](size_t i) {
      const Item& item = items[items.size() - 1 - i];
      step(list[item.tensor], item.begin, item.end);
    });
  }
}
}  // namespace

static void adamw(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                  Tensors last_grads, Tensors max_exp_avg_sqs, Tensors state_steps, double lr,
                  double beta1, double beta2, double eps, double weight_decay, double gamma,
                  std::optional<double> clip, double lr_1d, double beta1_1d, double beta2_1d,
                  double weight_decay_1d, int64_t caution, bool maximize, bool update_last_grad,
                  OptTensor schedule, OptTensor norm, OptTensor grad_scale, OptTensor found_inf) {
  const size_t count = params.size();
  for (size_t size : {grads.size(), exp_avgs.size(), exp_avg_sqs.size(), state_steps.size(),
                      max_exp_avg_sqs.empty() ? count : max_exp_avg_sqs.size()})
    STD_TORCH_CHECK(size == count, "mars: lists of different length, ", size, " and ", count);
  STD_TORCH_CHECK(last_grads.size() <= count, "mars: more last_grads than params");
  if (found_inf && value_of(*found_inf) != 0) return;
  const auto number = [&](int i, double x) { return schedule ? value_of(*schedule, i) : x; };
  Options o{{beta1, beta2, eps, number(0, lr), number(2, weight_decay), number(4, gamma)},
            {beta1_1d, beta2_1d, eps, number(1, lr_1d), number(3, weight_decay_1d), 0},
            clip,
            {},
            MarsCaution(caution),
            (maximize ? -1 : 1) / (grad_scale ? value_of(*grad_scale) : 1),
            !update_last_grad && maximize ? -1.0 : 1.0,
            update_last_grad};
  if (norm) o.norm = value_of(*norm);
  std::vector<MarsTensor> list;
  std::vector<double> steps;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& p = params[i];
    STD_TORCH_CHECK(p.is_cpu() && dense(p), "mars: params[", i, "] must be a dense CPU tensor");
    check_layout("grads", i, grads[i], p);
    MarsTensor t = gradient(i, grads[i], i < last_grads.size() ? &last_grads[i] : nullptr);
    t.p = p.data_ptr();
    t.p_type = dtype(p);
    t.m = state("exp_avgs", exp_avgs, i, p);
    t.v = state("exp_avg_sqs", exp_avg_sqs, i, p);
    if (!max_exp_avg_sqs.empty()) t.vmax = state("max_exp_avg_sqs", max_exp_avg_sqs, i, p);
    steps.push_back(std::min(value_of(state_steps[i]) + 1, kMaxStep));
    list.push_back(constants(t, o, steps.back()));
  }
  // nothing is changed before every tensor has been checked
  for (size_t i = 0; i < count; ++i) advance(state_steps[i], steps[i]);
  update(list, o);
}

DF_IMPL(CPU, m) {
  m.impl("mars_norm", TORCH_BOX(&norms));
  m.impl("mars_adamw_", TORCH_BOX(&adamw));
}
}  // namespace df
