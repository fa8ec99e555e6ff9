// Host side of the rotation on CUDA: alignment, spans of tokens, workspaces, registration.
#include "grape/frame_cuda.h"

#include "common/cuda_shim.h"
#include "grape/frame_host.h"

namespace df::cuda {
namespace {
constexpr int64_t kStep = 32, kCtas = 3 * 132;  // spans are whole steps; CTAs that fill the device

// Batch and time as one axis where every tensor of rows allows it.
void join_axes(FrameArgs& p) {
  for (const FrameRows* rows : {&p.x, &p.g})
    if (rows->data && rows->b != p.T * rows->t) return;
  if (p.B > 1) p.T *= p.B, p.B = 1;
}

FrameCuda prepare(const FrameInputs& in, const OptTensor& g) {
  FrameCuda p{};
  p.args = in.args();
  STD_TORCH_CHECK(p.args.type != DType::f64, "grape: no float64 rotation on CUDA");
  STD_TORCH_CHECK(p.args.D <= kFrameMaxD, "grape: D must be at most 256 on CUDA");
  STD_TORCH_CHECK(p.args.B * p.args.T < (int64_t(1) << 31), "grape: at most 2^31 tokens");
  if (g) p.args.g = frame_rows(*g);
  p.W = data(in.W);
  p.W_double = in.W && in.W->scalar_type() == ScalarType::Double;
  const int64_t size = p.args.type == DType::f32 ? 4 : 2, vector = 16 / size;
  const auto aligned = [&](const FrameRows& rows) {
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.b % vector == 0 &&
           rows.t % vector == 0 && rows.h % vector == 0;
  };
  p.vectors = p.args.D % vector == 0 && aligned(p.args.x) && aligned(p.args.g);
  return p;
}

// Spans of the tokens, so that `ctas` CTAs share them.
void spread(int64_t tokens, int64_t ctas, int64_t& span, int64_t& splits) {
  const int64_t steps = (tokens + kStep - 1) / kStep, wanted = ctas > 1 ? ctas : 1;
  const int64_t each = (steps + wanted - 1) / wanted;
  span = (each > 1 ? each : 1) * kStep;
  splits = (tokens + span - 1) / span;
}

template <class Fn>
void by_type(DType type, Fn f32, Fn bf16, Fn f16, const FrameCuda& p, void* stream) {
  (type == DType::f32 ? f32 : type == DType::bf16 ? bf16 : f16)(p, stream);
}

void channels(const FrameCuda& p, bool backward, void* stream) {
  switch (p.args.type) {
    case DType::f32: return frame_channels_f32_cuda(p, backward, stream);
    case DType::bf16: return frame_channels_bf16_cuda(p, backward, stream);
    default: return frame_channels_f16_cuda(p, backward, stream);
  }
}

Tensor fwd(const Tensor& x, const OptTensor& W, const Tensor& theta, const Tensor& t) {
  const FrameInputs in(x, W, theta, t);
  FrameCuda p = prepare(in, {});
  const Tensor y = empty(x, {p.args.B, p.args.T, p.args.H, p.args.D});
  const int64_t tokens = p.args.B * p.args.T;
  if (y.numel() == 0) return y;
  p.args.y = y.mutable_data_ptr();
  join_axes(p.args);
  Launch launch(in.x, in.W, in.theta, in.t, y);
  if (W) {
    by_type(p.args.type, &frame_fwd_f32_cuda, &frame_fwd_bf16_cuda, &frame_fwd_f16_cuda, p,
            launch.stream());
  } else {
    spread(tokens, 4 * kCtas / p.args.H, p.span, p.splits);
    channels(p, false, launch.stream());
  }
  launch.check();
  return y;
}

Tensor mixture_fwd(const Tensor& x, const Tensor&, const Tensor&, const Tensor&, const Tensor& t,
                   const Tensor& W, const Tensor& theta) {
  return fwd(x, W, theta, t);
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward bwd(const Tensor& dy, const Tensor& x, const OptTensor& W, const Tensor& theta,
             const Tensor& t, int64_t wanted) {
  const FrameInputs in(x, W, theta, t);
  const Tensor g = unit_last_stride(dy);
  STD_TORCH_CHECK(dtype(g) == dtype(x), "grape_frame_bwd: dy and x must share a dtype");
  FrameCuda p = prepare(in, g);
  FrameArgs& a = p.args;
  const int64_t H = a.H, D = a.D, r = a.r, tokens = a.B * a.T;
  a.frame = wanted & kWantFrame, a.generator = W && (wanted & kWantGenerator);
  const bool sums = a.frame || a.generator;
  const auto made = [&](bool here, std::initializer_list<int64_t> sizes) {
    return here ? empty(x, sizes, ScalarType::Float) : empty(x, {0}, ScalarType::Float);
  };
  const auto at = [](const Tensor& t) {
    return t.numel() ? static_cast<float*>(t.mutable_data_ptr()) : nullptr;
  };
  const Tensor dx = empty(x, {a.B, a.T, H, D}), dt = made(wanted & kWantT, {a.B, a.T, H}),
               dW = made(sums && W, {H, 2 * r, D}), K = made(a.generator, {H, 2 * r, 2 * r}),
               dtheta = made(a.frame, {H, r});
  if (dx.numel() == 0) {
    for (const Tensor& result : {dt, dW, K, dtheta})
      if (result.numel()) torch::stable::zero_(const_cast<Tensor&>(result));
    return {dx, dt, dW, K, dtheta};
  }
  a.y = dx.mutable_data_ptr(), a.dt = at(dt);
  join_axes(a);
  const int64_t blocks = (r + 15) / 16, grids = a.generator ? blocks * blocks : blocks;
  spread(tokens, kCtas / H, p.span, p.splits);
  spread(tokens, kCtas / (H * (grids > 1 ? grids : 1)), p.pair_span, p.pair_splits);
  const Tensor coefs = made(sums && W, {tokens, H, r, 4}),
               products = made(sums, {p.splits, H, W ? 2 * r : r, W ? D : 1}),
               pairs = made(sums && W, {p.pair_splits, H, r, a.generator ? r * 8 : 1});
  p.coefs = at(coefs), p.products = at(products), p.pairs = at(pairs);
  p.dW = at(dW), p.K = at(K), p.dtheta = at(dtheta);
  Launch launch(in.x, in.W, in.theta, in.t, g, dx, dt, dW, K, dtheta, coefs, products, pairs);
  if (W) {
    by_type(a.type, &frame_bwd_f32_cuda, &frame_bwd_bf16_cuda, &frame_bwd_f16_cuda, p,
            launch.stream());
    if (sums && r) frame_pairs_cuda(p, launch.stream());
  } else {
    channels(p, true, launch.stream());
  }
  if (sums && r) frame_finish_cuda(p, launch.stream());
  launch.check();
  return {dx, dt, dW, K, dtheta};
}
}  // namespace
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("grape_frame_fwd", TORCH_BOX(&df::cuda::fwd));
  m.impl("grape_mixture_fwd", TORCH_BOX(&df::cuda::mixture_fwd));
  m.impl("grape_frame_bwd", TORCH_BOX(&df::cuda::bwd));
}
