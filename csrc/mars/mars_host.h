// What the hosts of the MARS family share: lists of tensors and encoded sections become
// MarsTensors.
#pragma once
#include <algorithm>
#include <cmath>
#include <string>

#include "common/op.h"
#include "mars/mars_scalars.h"

namespace df {
using Tensors = std::vector<Tensor>;

// Integers and numbers of a section in the operator's arguments; python/deltafuse/optim/sections.py
// writes them in this order.
constexpr size_t kSectionInts = 5, kSectionNumbers = 8;
enum SectionFlag {
  kCorrected = 1,
  kStateless = 2,
  kWriteH = 4,
  kMaximize = 8,
  kStochastic = 16,
  kAmsgrad = 32
};

struct MarsLists {  // a section's tensors follow those of the section before, where it has such
  Tensors params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, last_grads, masters, absmaxes,
      state_steps;
};

struct MarsCall {
  std::vector<MarsSection> sections;
  std::vector<bool> amsgrad;    // of each section
  std::vector<int64_t> counts;  // tensors of each section
  std::vector<MarsTensor> tensors;
  std::vector<float*> steps;  // of each tensor; null: nothing depends on it
};

inline MarsCall mars_sections(const std::vector<int64_t>& ints,
                              const std::vector<double>& numbers) {
  STD_TORCH_CHECK(ints.size() % kSectionInts == 0 &&
                      numbers.size() / kSectionNumbers == ints.size() / kSectionInts &&
                      numbers.size() % kSectionNumbers == 0,
                  "mars: sections of ", ints.size(), " integers and ", numbers.size(), " numbers");
  MarsCall call;
  for (size_t i = 0; i < ints.size() / kSectionInts; ++i) {
    const int64_t* n = &ints[i * kSectionInts];
    const double* x = &numbers[i * kSectionNumbers];
    const auto has = [&](SectionFlag flag) { return (n[4] & flag) != 0; };
    call.counts.push_back(n[0]);
    call.amsgrad.push_back(has(kAmsgrad));
    call.sections.push_back({MarsRule(n[1]), MarsCaution(n[2]), MarsMaster(n[3]), has(kCorrected),
                             has(kStateless), has(kWriteH), has(kMaximize), has(kStochastic), x[0],
                             x[1], x[2], x[3], x[4], x[5], x[6], x[7]});
  }
  return call;
}

inline bool is_dense(const Tensor& t) {  // some order of the dimensions is contiguous
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

// `given` sections come after the step was counted; they look at it for random bits only.
inline bool counts_steps(const MarsSection& x) {
  return x.rule != MarsRule::given;
}

// What tensors are compared with; read once, since calls of torch's shim add up in long lists.
struct Layout {
  torch::headeronly::IntHeaderOnlyArrayRef sizes, strides;
  bool is_cpu = true;
  Layout() = default;
  explicit Layout(const Tensor& t) : sizes(t.sizes()), strides(t.strides()), is_cpu(t.is_cpu()) {}
  bool holds_for(const Tensor& t) const {  // strides where they matter
    if (t.is_cpu() != is_cpu || !t.sizes().equals(sizes)) return false;  // torch 2.11 has no !=
    const auto found = t.strides();
    for (size_t d = 0; d < sizes.size(); ++d)
      if (found[d] != strides[d] && sizes[d] != 1) return false;
    return true;
  }
};

// Draws a section's tensors from the lists, in order, and checks that they go with their parameter.
class MarsReader {
 public:
  MarsReader(const MarsLists& lists, const Tensors& grads) : lists_(lists), all_grads_(grads) {}

  MarsTensor next(const MarsSection& x, bool amsgrad, int32_t section) {
    const Tensor& p = take("params", lists_.params, params_);
    layout_ = Layout(p);
    step_ = nullptr;
    STD_TORCH_CHECK(is_dense(p), "mars: ", name("params"), " must be dense");
    MarsTensor t{};
    t.n = n_ = p.numel(), t.section = section, t.number = uint32_t(params_ - 1);
    t.p = {p.data_ptr(), type_ = dtype(p)};
    const Tensor& g = like_p("grads", all_grads_, grads_);
    t.g = g.const_data_ptr(), t.g_type = dtype(g);
    if (counts_steps(x) || x.stochastic) {
      const Tensor& step = take("state_steps", lists_.state_steps, steps_);
      STD_TORCH_CHECK(step.numel() == 1 && step.scalar_type() == ScalarType::Float,
                      "mars: ", name("state_steps"), " must be one float32");
      step_ = static_cast<float*>(step.data_ptr());
    }
    if (x.rule == MarsRule::given) return master(x, t);
    t.m = state("exp_avgs", lists_.exp_avgs, moments_);
    if (x.rule == MarsRule::adamw) t.v = state("exp_avg_sqs", lists_.exp_avg_sqs, squares_);
    if (amsgrad) t.vmax = state("max_exp_avg_sqs", lists_.max_exp_avg_sqs, maxima_);
    if (x.corrected) t.h = array(like_p("last_grads", lists_.last_grads, last_));
    return master(x, t);
  }
  // Of the tensor that next() returned; null where nothing depends on it.
  float* step() const { return step_; }
  bool done() const {
    return params_ == lists_.params.size() && grads_ == all_grads_.size() &&
           moments_ == lists_.exp_avgs.size() && squares_ == lists_.exp_avg_sqs.size() &&
           maxima_ == lists_.max_exp_avg_sqs.size() && last_ == lists_.last_grads.size() &&
           masters_ == lists_.masters.size() && absmaxes_ == lists_.absmaxes.size() &&
           steps_ == lists_.state_steps.size();
  }

 private:
  const Tensor& take(const char* list, const Tensors& tensors, size_t& at) {
    STD_TORCH_CHECK(at < tensors.size(), "mars: ", list, " has only ", tensors.size(), " tensors");
    return tensors[at++];
  }
  std::string name(const char* list) const {
    return std::string(list) + " of parameter " + std::to_string(params_ - 1);
  }
  const Tensor& like_p(const char* list, const Tensors& tensors, size_t& at) {
    const Tensor& t = take(list, tensors, at);
    STD_TORCH_CHECK(layout_.holds_for(t) || (t.numel() == 0 && n_ == 0), "mars: ", name(list),
                    " must have its shape, strides and device");
    return t;
  }
  MarsArray array(const Tensor& t) {
    const bool codes = t.element_size() == 1 && t.scalar_type() == ScalarType::Byte;
    if (!codes) return {t.data_ptr(), dtype(t)};
    const Tensor& factors = take("absmaxes", lists_.absmaxes, absmaxes_);
    STD_TORCH_CHECK(factors.numel() == (t.numel() + kMarsQuantum - 1) / kMarsQuantum &&
                        factors.scalar_type() == ScalarType::Float,
                    "mars: ", name("absmaxes"), " must have a float32 for every ", kMarsQuantum,
                    " elements");
    return {t.data_ptr(), DType::f32, static_cast<float*>(factors.data_ptr())};
  }
  MarsArray state(const char* list, const Tensors& tensors, size_t& at) {
    const MarsArray a = array(like_p(list, tensors, at));
    const bool wide = type_ == DType::f64;
    STD_TORCH_CHECK(
        wide ? !a.absmax && a.type == DType::f64 : a.type == DType::f32 || a.type == DType::bf16,
        "mars: ", name(list),
        " must be float32, bfloat16 or uint8, or float64 for a float64 parameter");
    return a;
  }
  MarsTensor& master(const MarsSection& x, MarsTensor& t) {
    STD_TORCH_CHECK(!x.stochastic || type_ == DType::bf16,
                    "mars: stochastic rounding needs bfloat16 parameters");
    if (x.master == MarsMaster::none) return t;
    const bool split = x.master == MarsMaster::split16;
    const Tensor& m = like_p("masters", lists_.masters, masters_);
    STD_TORCH_CHECK(m.scalar_type() == (split ? ScalarType::Short : ScalarType::Float) &&
                        (!split || type_ == DType::bf16),
                    "mars: ", name("masters"),
                    " must be float32, or the int16 low halves of a bfloat16 one");
    t.master = m.data_ptr();
    return t;
  }

  const MarsLists& lists_;
  const Tensors& all_grads_;
  // of the parameter that next() is at
  Layout layout_;
  int64_t n_ = 0;
  DType type_ = DType::f32;
  float* step_ = nullptr;
  size_t params_ = 0, grads_ = 0, moments_ = 0, squares_ = 0, maxima_ = 0, last_ = 0, masters_ = 0,
         absmaxes_ = 0, steps_ = 0;
};

inline MarsCall mars_call(const MarsLists& lists, const Tensors& grads,
                          const std::vector<int64_t>& ints, const std::vector<double>& numbers) {
  MarsCall call = mars_sections(ints, numbers);
  MarsReader reader(lists, grads);
  for (size_t s = 0; s < call.sections.size(); ++s)
    for (int64_t i = 0; i < call.counts[s]; ++i) {
      call.tensors.push_back(reader.next(call.sections[s], call.amsgrad[s], int32_t(s)));
      call.steps.push_back(reader.step());
    }
  STD_TORCH_CHECK(reader.done(), "mars: the lists have more tensors than the sections");
  return call;
}

// g and h alone, for norms; grads and last_grads belong to `corrected` sections.
inline MarsCall mars_norm_call(const Tensors& grads, const Tensors& last_grads,
                               const Tensors& absmaxes, const std::vector<int64_t>& ints,
                               const std::vector<double>& numbers) {
  MarsCall call = mars_sections(ints, numbers);
  size_t at = 0, factors = 0;
  for (size_t s = 0; s < call.sections.size(); ++s)
    for (int64_t i = 0; i < call.counts[s]; ++i, ++at) {
      STD_TORCH_CHECK(at < grads.size() && at < last_grads.size(), "mars: too few tensors");
      const Tensor &g = grads[at], &h = last_grads[at];
      STD_TORCH_CHECK(g.numel() == h.numel(), "mars: grads and last_grads of different sizes");
      MarsTensor t{};
      t.n = g.numel(), t.section = int32_t(s), t.number = uint32_t(at);
      t.p.type = compute_type(g) == ScalarType::Double ? DType::f64 : DType::f32;
      t.g = g.const_data_ptr(), t.g_type = dtype(g);
      const bool codes = h.scalar_type() == ScalarType::Byte;
      STD_TORCH_CHECK(!codes || factors < absmaxes.size(), "mars: too few absmaxes");
      t.h = {h.data_ptr(), codes ? DType::f32 : dtype(h),
             codes ? static_cast<float*>(absmaxes[factors++].data_ptr()) : nullptr};
      call.tensors.push_back(t);
    }
  return call;
}
}  // namespace df
