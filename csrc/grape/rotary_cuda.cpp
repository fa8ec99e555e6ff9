// Host side of the rotation on CUDA: how much a CTA takes, alignment, registration.
#include <algorithm>

#include "common/cuda_shim.h"
#include "grape/rotary_host.h"
#include "grape/rotary_launch.h"

namespace df::cuda {
namespace {
constexpr int64_t kAngleFloats = 8192;  // shared memory of a forward CTA
// of a backward CTA: its angle heads; one head at most; products of a tile
constexpr int64_t kGradFloats = 6144, kMostGradFloats = 8064, kTileFloats = 4096;
constexpr int64_t kMostTokens = 8, kTwoPerSm = 2 * 132;

template <class Heads>
bool aligned(const Heads& x, int64_t size) {
  const int64_t piece = 16 / size;
  return reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && x.b % piece == 0 && x.t % piece == 0 &&
         x.h % piece == 0;
}

// Whether every row is made of whole 16-byte pieces, for all tensors that the launch touches.
bool vectors(const RotaryLaunch& x, bool grads) {
  const RotaryArgs& p = x.args;
  const int64_t size = p.type == DType::f32 ? 4 : 2, piece = 16 / size;
  if (p.P == 0 || (p.interleaved ? 2 * p.P : p.P) % piece != 0) return false;
  const bool k = p.k.H > 0;
  return aligned(p.q, size) && aligned(p.y_q, size) && (!grads || aligned(x.grads.saved_q, size)) &&
         (!k || (aligned(p.k, size) && aligned(p.y_k, size) &&
                 (!grads || aligned(x.grads.saved_k, size))));
}

void check(const RotaryArgs& p) {
  STD_TORCH_CHECK(p.type != DType::f64, "grape_rotary: no float64 on CUDA");
  STD_TORCH_CHECK(p.P <= kRotaryMaxPlanes, "grape_rotary: at most ", kRotaryMaxPlanes,
                  " planes on CUDA");
}

void run(const RotaryLaunch& x, bool grads, void* stream) {
  switch (x.args.type) {
    case DType::f32: return rotary_f32_cuda(x, grads, stream);
    case DType::bf16: return rotary_bf16_cuda(x, grads, stream);
    default: return rotary_f16_cuda(x, grads, stream);
  }
}

void apply(const RotaryInputs& in, RotaryArgs p, const Tensor& y_q, const OptTensor& y_k) {
  check(p);
  p.y_q = RotaryInputs::output(y_q);
  if (y_k) p.y_k = RotaryInputs::output(*y_k);
  const int64_t tokens = p.B * p.T;
  if (tokens == 0 || (p.q.H + p.k.H) * p.D == 0) return;
  RotaryLaunch x{};
  x.args = p;
  x.vectors = vectors(x, false);
  const int64_t each = std::max<int64_t>(1, rotary_head_floats(p, false, false));
  x.heads = int32_t(std::clamp<int64_t>(kAngleFloats / each, 1, p.Ha));
  const int64_t groups = (p.Ha + x.heads - 1) / x.heads;
  int64_t take = std::clamp<int64_t>(kAngleFloats / (each * x.heads), 1, kMostTokens);
  while (take > 1 && (tokens + take - 1) / take * groups < kTwoPerSm) take /= 2;
  x.tokens = int32_t(take);
  Launch launch(in.q, in.k, in.freqs, in.positions, in.offsets, in.cu_seqlens, in.tables[0],
                in.tables[1], in.tables[2], in.tables[3], y_q, y_k);
  run(x, false, launch.stream());
  launch.check();
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
  check(p);
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
  RotaryLaunch x{};
  x.args = p;
  x.grads = to.args(in, p, q, k);
  x.vectors = vectors(x, true);
  const bool angles = x.grads.angles;
  const int64_t tokens = p.B * p.T, columns = angles ? p.Hf * p.P * p.A : 0;
  const int64_t each = std::max<int64_t>(1, rotary_head_floats(p, true, angles));
  STD_TORCH_CHECK(each <= kMostGradFloats, "grape_rotary: ", p.P, " planes of ", p.A,
                  " axes are too many for a backward pass on CUDA");
  x.heads = int32_t(std::clamp<int64_t>(kGradFloats / each, 1, p.Ha));
  x.tokens = int32_t(std::max<int64_t>(1, (tokens + kRotaryMaxParts - 1) / kRotaryMaxParts));
  x.part_count = int32_t((tokens + x.tokens - 1) / x.tokens);
  const int64_t rows = x.heads * (p.q.H + p.k.H) / p.Ha, row = p.P * (angles ? 1 : 2);
  x.tile = int32_t(
      std::clamp<int64_t>(kTileFloats / std::max<int64_t>(1, row), 1, std::max<int64_t>(1, rows)));
  const Tensor parts = empty(in.q, {x.part_count * columns}, ScalarType::Double);
  x.parts = static_cast<double*>(parts.mutable_data_ptr());
  x.dfreqs = to.dfreqs.mutable_data_ptr();
  Launch launch(in.q, in.k, in.freqs, in.positions, in.offsets, in.cu_seqlens, in.tables[0],
                in.tables[1], in.tables[2], in.tables[3], q, k, to.dq, dk, to.dfreqs, to.dpositions,
                to.tables[0], to.tables[1], to.tables[2], to.tables[3], parts);
  if (tokens > 0 && (p.q.H + p.k.H) * p.D > 0) run(x, true, launch.stream());
  if (columns > 0) rotary_sum_cuda(x, launch.stream());
  launch.check();
  return result;
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("grape_rotary_fwd", TORCH_BOX((&df::rotary_fwd_op<&df::cuda::apply>)));
  m.impl("grape_rotary_bwd", TORCH_BOX(&df::cuda::bwd));
  m.impl("grape_rotary_out", TORCH_BOX((&df::rotary_out_op<&df::cuda::apply>)));
}
