// Host side of the rotation on the CPU: frequencies in both forms, blocks of tokens, registration.
#include "grape/rotary_cpu.h"

#include <algorithm>
#include <cmath>

#include "common/cpu/partial_sums.h"
#include "grape/rotary_host.h"
#include "grape/rotary_turns.h"

namespace df::cpu {
namespace {
constexpr int64_t kStreamBytes = int64_t(16) << 20;  // of an output, from where it bypasses caches
constexpr int64_t kLeastBlock = 32, kMostBlocks = 256;  // tokens, partial sums

// The call and what it points to.
struct Call {
  static constexpr int64_t kNone = INT64_MIN;
  RotaryCpu call{};
  std::vector<uint64_t> turns;
  std::vector<double> theta;
  int64_t bad_row = kNone;

  explicit Call(const RotaryArgs& p) {
    call.args = p;
    call.bad_row = &bad_row;
    call.finite = true;
    if (!p.freqs) return;
    turns.resize(p.Hf * p.A * p.P), theta.resize(turns.size());
    for (int64_t h = 0; h < p.Hf; ++h)
      for (int64_t i = 0; i < p.P; ++i)
        for (int64_t a = 0; a < p.A; ++a) {
          const int64_t from = (h * p.P + i) * p.A + a, to = (h * p.A + a) * p.P + i;
          const double x = p.freqs64 ? static_cast<const double*>(p.freqs)[from]
                                     : double(static_cast<const float*>(p.freqs)[from]);
          uint64_t bits;
          std::memcpy(&bits, &x, sizeof(x));
          theta[to] = x, turns[to] = turn_of_bits(bits);
          call.finite = call.finite && std::isfinite(x);
        }
    call.turns = turns.data(), call.theta = theta.data();
  }
  void check_rows() const {
    STD_TORCH_CHECK(bad_row == kNone, "grape_rotary: cos and sin have ", call.args.rows,
                    " rows, but there is position ", bad_row);
  }
};

// Whether rows of an output are whole, aligned cache lines and worth to be written past the caches.
bool streams(const Tensor& in, const Tensor& out, int64_t P) {
  const auto lines = [](int64_t elements) { return elements % 16 == 0; };
  return out.scalar_type() == ScalarType::Float && out.numel() * 4 >= kStreamBytes &&
         out.const_data_ptr() != in.const_data_ptr() && lines(P) && lines(out.stride(0)) &&
         lines(out.stride(1)) && lines(out.stride(2)) &&
         reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 64 == 0;
}

void apply(const RotaryInputs& in, RotaryArgs p, const Tensor& y_q, const OptTensor& y_k) {
  p.y_q = RotaryInputs::output(y_q);
  if (y_k) p.y_k = RotaryInputs::output(*y_k);
  const int64_t tokens = p.B * p.T, row = (p.q.H + p.k.H) * p.D;
  if (tokens == 0 || row == 0) return;
  Call call(p);
  call.call.stream = streams(in.q, y_q, p.P) && (!y_k || streams(*in.k, *y_k, p.P));
  auto* kernel = DF_CPU(rotary_apply);
  parallel_for(0, tokens, std::max<int64_t>(1, 16384 / row), [&](int64_t begin, int64_t end) {
    const CacheLines scratch(rotary_scratch(p));
    kernel(call.call, begin, end, scratch.data());
  });
  call.check_rows();
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward bwd(const Tensor& dy_q, const OptTensor& dy_k, const OptTensor& q_, const OptTensor& k_,
             const OptTensor& freqs, const OptTensor& positions, const OptTensor& offsets,
             const OptTensor& cu_seqlens, const OptTensor& cos_q, const OptTensor& sin_q,
             const OptTensor& cos_k, const OptTensor& sin_k, int64_t offset, double factor,
             int64_t flags) {
  const RotaryInputs in(dy_q, dy_k, freqs, positions, offsets, cu_seqlens, cos_q, sin_q, cos_k,
                        sin_k, offset, factor, flags);
  RotaryArgs p = in.args(true);
  const RotaryGradTensors to(in, p);
  const Backward result{to.dq,        to.dk,        to.dfreqs,    to.dpositions,
                        to.tables[0], to.tables[1], to.tables[2], to.tables[3]};
  const OptTensor dk = dy_k ? OptTensor(to.dk) : std::nullopt;
  if (!(flags & (kAngleGrads | kTableGrads))) {
    apply(in, p, to.dq, dk);
    return result;
  }
  const OptTensor q = unit_last_stride(q_), k = unit_last_stride(k_);
  p.y_q = RotaryInputs::output(to.dq);
  if (dk) p.y_k = RotaryInputs::output(*dk);
  const RotaryGrads grads = to.args(in, p, q, k);
  const Call call(p);
  const int64_t tokens = p.B * p.T, columns = grads.angles ? p.Hf * p.P * p.A : 0;
  const int64_t block = std::max(kLeastBlock, (tokens + kMostBlocks - 1) / kMostBlocks);
  const Tensor wide = empty(in.q, {0}, ScalarType::Double);
  PartialSums sums(wide, tokens, block, columns, rotary_scratch(p) / 8);
  auto* kernel = DF_CPU(rotary_grads);
  sums.run([&](int64_t first, int64_t last, void* to, void* scratch) {
    kernel(call.call, grads, first, last, static_cast<double*>(to), scratch);
  });
  if (grads.angles) {
    Tensor dfreqs = to.dfreqs;
    torch::stable::copy_(dfreqs, torch::stable::view(sums.total(), {p.Hf, p.P, p.A}));
  }
  return result;
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("grape_rotary_fwd", TORCH_BOX((&df::rotary_fwd_op<&df::cpu::apply>)));
  m.impl("grape_rotary_bwd", TORCH_BOX(&df::cpu::bwd));
  m.impl("grape_rotary_out", TORCH_BOX((&df::rotary_out_op<&df::cpu::apply>)));
}
