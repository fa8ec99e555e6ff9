// Host side of the rotation on CPU: frames in padded rows, tasks, sums over tokens, registration.
#include "grape/frame_cpu.h"

#include "common/cpu/partial_sums.h"
#include "grape/frame_host.h"

namespace df::cpu {
namespace {
constexpr int64_t kLeastBlock = 2 * kFrameTile, kMostBlocks = 32;

// W as it is and transposed, in rows padded with zeros.
template <class T, class From>
void pack(const Tensor& W, int64_t padded_D, int64_t padded_K, const Tensor& to,
          const Tensor& to_t) {
  const From* in = static_cast<const From*>(W.const_data_ptr());
  T *out = static_cast<T*>(to.mutable_data_ptr()),
    *out_t = static_cast<T*>(to_t.mutable_data_ptr());
  const int64_t H = W.size(0), D = W.size(1), K = W.size(2);
  parallel_for(0, H, std::max<int64_t>(1, 65536 / (D * K + 1)), [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h)
      for (int64_t d = 0; d < D; ++d)
        for (int64_t k = 0; k < K; ++k)
          out[(h * D + d) * padded_K + k] = out_t[(h * K + k) * padded_D + d] =
              T(in[(h * D + d) * K + k]);
  });
}

struct Call {
  FrameInputs in;
  FrameCpu call{};
  Tensor W, Wt;
  ScalarType type;

  explicit Call(FrameInputs inputs)
      : in(std::move(inputs)), W(in.x), Wt(in.x), type(compute_type(in.x)) {
    const FrameArgs args = in.args();
    const int64_t lanes = wide() ? 8 : 16, K = 2 * args.r;
    const auto padded = [&](int64_t n) { return (n + lanes - 1) / lanes * lanes; };
    call = {args, padded(args.D), padded(in.W ? std::max<int64_t>(K, 1) : args.D), nullptr,
            nullptr};
    if (!in.W) return;
    W = zeros(in.x, {args.H, args.D, call.K}, type);
    Wt = zeros(in.x, {args.H, K, call.D}, type);
    const bool from_double = in.W->scalar_type() == ScalarType::Double;
    (wide()        ? from_double ? &pack<double, double> : &pack<double, float>
            : from_double ? &pack<float, double>
                   : &pack<float, float>)(*in.W, call.D, call.K, W, Wt);
    call.W = W.const_data_ptr(), call.Wt = Wt.const_data_ptr();
  }
  bool wide() const { return type == ScalarType::Double; }
  int64_t tokens() const { return call.args.B * call.args.T; }

  // fn(head, first token, last token, scratch), tile after tile
  template <class Fn>
  void each_tile(Fn fn) const {
    const int64_t H = call.args.H, tiles = (tokens() + kFrameTile - 1) / kFrameTile;
    const int64_t work = kFrameTile * call.D * (8 + 4 * call.args.r);
    parallel_for(0, tiles * H, std::max<int64_t>(1, (1 << 18) / work), [&](int64_t i, int64_t end) {
      const CacheLines scratch(frame_scratch(call) * (wide() ? 8 : 4));
      for (; i < end; ++i) {
        const int64_t first = i / H * kFrameTile;
        fn(i % H, first, std::min(first + kFrameTile, tokens()), scratch.data());
      }
    });
  }
};

Tensor fwd(const Tensor& x, const OptTensor& W, const Tensor& theta, const Tensor& t) {
  Call run(FrameInputs(x, W, theta, t));
  const FrameArgs& a = run.call.args;
  const Tensor y = empty(x, {a.B, a.T, a.H, a.D});
  run.call.args.y = y.mutable_data_ptr();
  auto* kernel = DF_CPU(frame_fwd);
  run.each_tile([&](int64_t h, int64_t first, int64_t last, void* scratch) {
    kernel(run.call, run.wide(), h, first, last, scratch);
  });
  return y;
}

Tensor mixture_fwd(const Tensor& x, const Tensor&, const Tensor&, const Tensor&, const Tensor& t,
                   const Tensor& W, const Tensor& theta) {
  return fwd(x, W, theta, t);
}

// Sums of a head to dW^T [2 r, D], K [2 r, 2 r] and dtheta [r], without padding.
template <class T>
void unpack(const FrameCpu& p, const T* sums, T* dW, T* K, T* dtheta) {
  const FrameSums at(p);
  const int64_t D = p.args.D, r = p.args.r, n = 2 * r;
  if (p.args.frame) std::copy(sums + at.dtheta, sums + at.dtheta + r, dtheta);
  if (p.W)
    for (int64_t k = 0; k < n; ++k)
      std::copy(sums + at.planes + k * p.D, sums + at.planes + k * p.D + D, dW + k * D);
  if (!p.args.generator) return;
  for (int64_t j = 0; j < r; ++j)
    for (int64_t k = j; k < r; ++k) {
      T part[4];
      for (int i = 0; i < 4; ++i) part[i] = sums[at.pairs + (i * r + j) * r + k] / 2;
      const T block[2][2] = {{part[0] + part[2], part[3] - part[1]},
                             {part[1] + part[3], part[0] - part[2]}};
      for (int64_t u = 0; u < 2; ++u)
        for (int64_t v = 0; v < 2; ++v) {  // skew
          K[(2 * k + v) * n + 2 * j + u] = -block[u][v];
          K[(2 * j + u) * n + 2 * k + v] = block[u][v];
        }
    }
  for (int64_t j = 0; j < n; ++j)
    for (int64_t k = 0; k < n; ++k) K[j * n + k] -= sums[at.across + k * p.K + j];
}

template <class T>
void unpack_heads(const FrameCpu& p, const Tensor& total, const Tensor& dW, const Tensor& K,
                  const Tensor& dtheta) {
  const FrameSums at(p);
  const int64_t r = p.args.r;
  const auto of = [](const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); };
  for (int64_t h = 0; h < p.args.H; ++h)
    unpack(p, of(total) + h * at.total, of(dW) + h * 2 * r * p.args.D, of(K) + h * 4 * r * r,
           of(dtheta) + h * r);
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward bwd(const Tensor& dy, const Tensor& x, const OptTensor& W, const Tensor& theta,
             const Tensor& t, int64_t wanted) {
  const Tensor g = unit_last_stride(dy);
  STD_TORCH_CHECK(dtype(g) == dtype(x), "grape_frame_bwd: dy and x must share a dtype");
  Call run(FrameInputs(x, W, theta, t));
  FrameArgs& a = run.call.args;
  const int64_t H = a.H, D = a.D, r = a.r;
  a.frame = wanted & kWantFrame, a.generator = W && (wanted & kWantGenerator);
  a.g = frame_rows(g);
  const Tensor dx = empty(x, {a.B, a.T, H, D});
  const Tensor dt = wanted & kWantT ? empty(x, {a.B, a.T, H}, run.type) : empty(x, {0}, run.type);
  a.y = dx.mutable_data_ptr();
  a.dt = wanted & kWantT ? dt.mutable_data_ptr() : nullptr;
  const bool sums_wanted = a.frame || a.generator;
  const auto made = [&](bool here, std::initializer_list<int64_t> sizes) {
    return here ? empty(x, sizes, run.type) : empty(x, {0}, run.type);
  };
  const Tensor dW = made(sums_wanted && W, {H, 2 * r, D}), K = made(a.generator, {H, 2 * r, 2 * r}),
               dtheta = made(a.frame, {H, r});
  auto* kernel = DF_CPU(frame_bwd);
  if (!sums_wanted) {
    run.each_tile([&](int64_t h, int64_t first, int64_t last, void* scratch) {
      kernel(run.call, run.wide(), h, first, last, nullptr, scratch);
    });
    return {dx, dt, dW, K, dtheta};
  }
  const FrameSums at(run.call);
  const int64_t even = (run.tokens() + kMostBlocks - 1) / kMostBlocks;
  const int64_t block = std::max(kLeastBlock, (even + kFrameTile - 1) / kFrameTile * kFrameTile);
  PartialSums sums(x, run.tokens(), block, H * at.total, frame_scratch(run.call));
  const int64_t bytes = at.total * (run.wide() ? 8 : 4);
  sums.run([&](int64_t first, int64_t last, void* to, void* scratch) {
    for (int64_t n = first; n < last; n += kFrameTile)
      for (int64_t h = 0; h < H; ++h)
        kernel(run.call, run.wide(), h, n, std::min(n + kFrameTile, last),
               static_cast<char*>(to) + h * bytes, scratch);
  });
  (run.wide() ? &unpack_heads<double> : &unpack_heads<float>)(run.call, sums.total(), dW, K,
                                                              dtheta);
  return {dx, dt, dW, K, dtheta};
}

std::tuple<Tensor, Tensor> tridiagonal(const Tensor& L) {
  STD_TORCH_CHECK(L.dim() == 3 && L.size(1) == L.size(2) && L.scalar_type() == ScalarType::Double,
                  "grape_skew_tridiagonal: L must be [H, n, n] in float64");
  const int64_t H = L.size(0), n = L.size(1);
  const Tensor A = torch::stable::clone(contiguous(L));
  const Tensor e = empty(L, {H, std::max<int64_t>(n - 1, 0)}), Q = empty(L, {H, n, n});
  const auto of = [](const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); };
  auto* kernel = DF_CPU(skew_tridiagonal);
  parallel_for(0, H, std::max<int64_t>(1, 65536 / (n * n * n + 1)), [&](int64_t h, int64_t end) {
    std::vector<double> scratch(2 * n);
    for (; h < end; ++h)
      kernel(n, of(A) + h * n * n, of(e) + h * (n - 1), of(Q) + h * n * n, scratch.data());
  });
  return {e, Q};
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("grape_frame_fwd", TORCH_BOX(&df::cpu::fwd));
  m.impl("grape_mixture_fwd", TORCH_BOX(&df::cpu::mixture_fwd));
  m.impl("grape_frame_bwd", TORCH_BOX(&df::cpu::bwd));
  m.impl("grape_skew_tridiagonal", TORCH_BOX(&df::cpu::tridiagonal));
}
