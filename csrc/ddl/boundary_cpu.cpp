// Host side of the boundary on CPU: weights in padded rows, results, tasks, registration.
#include "ddl/boundary_cpu.h"

#include "common/cpu/partial_sums.h"
#include "ddl/boundary_host.h"

namespace df::cpu {
namespace {
constexpr int64_t kStreamBytes = 16 << 20;  // larger states go past the caches
constexpr int64_t kLeastBlock = 16, kMostBlocks = 128;

int64_t padded(int64_t d, ScalarType type) {
  const int64_t lanes = type == ScalarType::Double ? 8 : 16;
  return (d + lanes - 1) / lanes * lanes;
}

template <class T>
void pad_rows(const Tensor& from, int64_t width, int64_t padded_width, const Tensor& to) {
  const T* in = static_cast<const T*>(from.const_data_ptr());
  T* out = static_cast<T*>(to.mutable_data_ptr());
  for (int64_t r = 0; r < from.numel() / width; ++r)
    std::copy(in + r * width, in + (r + 1) * width, out + r * padded_width);
}

// Rows of `width` elements in the compute type, zeros behind them.
OptTensor widened(const OptTensor& weight, int64_t width, int64_t padded_width, ScalarType type) {
  if (!weight) return weight;
  const Tensor plain = contiguous(torch::stable::to(*weight, type));
  if (width == padded_width) return plain;
  const Tensor wide = zeros(plain, {plain.numel() / width * padded_width}, type);
  (type == ScalarType::Double ? &pad_rows<double> : &pad_rows<float>)(plain, width, padded_width,
                                                                      wide);
  return wide;
}

struct Call {
  BoundaryInputs in;
  BoundaryWeights weights;
  BoundaryCpu call{};
  ScalarType type;

  Call(BoundaryInputs inputs, const BoundaryArgs& args, const BoundaryWeights& given, bool read_out)
      : in(std::move(inputs)), type(compute_type(in.x)) {
    const int64_t d = args.d, wide = padded(d, type);
    weights = {widened(given.read, d * args.d_v, wide * args.d_v, type),
               widened(given.norm, d, wide, type),
               widened(given.W_v, d, wide, type),
               widened(given.b_v, 1, 1, type),
               widened(given.W_beta, d, wide, type),
               widened(given.b_beta, 1, 1, type)};
    call = {args, wide, read_out, false};
    Weight* const slots[] = {&call.args.read, &call.args.norm,   &call.args.W_v,
                             &call.args.b_v,  &call.args.W_beta, &call.args.b_beta};
    const OptTensor* const tensors[] = {&weights.read, &weights.norm,   &weights.W_v,
                                        &weights.b_v,  &weights.W_beta, &weights.b_beta};
    for (int i = 0; i < 6; ++i) slots[i]->data = data(*tensors[i]);
  }
  bool wide() const { return type == ScalarType::Double; }

  void forward() const {
    const BoundaryArgs& p = call.args;
    auto* kernel = DF_CPU(boundary_fwd);
    const int64_t grain = std::max<int64_t>(1, 16384 / (p.d * p.d_v));
    parallel_for(0, p.N, grain, [&](int64_t begin, int64_t end) {
      const CacheLines scratch(boundary_scratch(call) * (wide() ? 8 : 4));
      kernel(call, wide(), begin, end, scratch.data());
    });
  }
};

bool streams(const Tensor& y) {
  return y.numel() * int64_t(y.element_size()) >= kStreamBytes;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward fwd(const Tensor& x, const OptTensor& k, const OptTensor& v, const OptTensor& beta,
            const OptTensor& beta_erase, const OptTensor& read, const OptTensor& norm,
            const OptTensor& W_v, const OptTensor& b_v, const OptTensor& W_beta,
            const OptTensor& b_beta, int64_t act, double k_eps, double norm_eps, double v_scale,
            int64_t flags) {
  const BoundaryInputs in(x, k, v, beta, beta_erase);
  const BoundaryArgs args = in.args(act, k_eps, norm_eps, v_scale, flags);
  const bool read_out = (flags & (kXIn | kNorm)) || W_v || W_beta;
  Call run(in, args, {read, norm, W_v, b_v, W_beta, b_beta}, read_out);
  const ScalarType type = run.type, act_type = scalar_type(act);
  const int64_t N = args.N, d = args.d, d_v = args.d_v;
  const Tensor y = k ? empty(x, {N, d, d_v}) : empty(x, {0});
  const Tensor x_in = flags & kXIn ? empty(x, {N, d}, act_type) : empty(x, {0}, act_type);
  const Tensor c = flags & kNorm ? empty(x, {N, d}, act_type) : empty(x, {0}, act_type);
  const Tensor z_v = W_v ? empty(x, {N, d_v}, type) : empty(x, {0}, type);
  const Tensor z_beta = W_beta ? empty(x, {N}, type) : empty(x, {0}, type);
  const Tensor saved = flags & kSave ? empty(x, {N, d_v + 2}, type) : empty(x, {0}, type);
  BoundaryArgs& p = run.call.args;
  p.y = pointer(y), p.x_in = pointer(x_in), p.c = pointer(c), p.z_v = pointer(z_v);
  p.z_beta = pointer(z_beta), p.saved = pointer(saved);
  run.call.stream = k && streams(y);
  run.forward();
  return {y, x_in, c, z_v, z_beta, saved};
}

void rewrite_out(const Tensor& x, const Tensor& k, const Tensor& v, const Tensor& beta,
                 const OptTensor& beta_erase, const Tensor& out, double k_eps, double v_scale,
                 int64_t flags) {
  const BoundaryInputs in(x, k, v, beta, beta_erase);
  expect_out(out, x);
  const BoundaryArgs args = in.args(int64_t(dtype(k)), k_eps, 0, v_scale, flags);
  Call run(in, args, {}, false);
  run.call.args.y = pointer(out);
  run.call.stream = streams(out);
  run.forward();
}

// [rows, width] of the weight's shape and dtype, from rows that are `padded_width` apart.
template <class T>
Tensor unpadded(const Tensor& total, int64_t begin, int64_t width, int64_t padded_width,
                const Tensor& weight) {
  const Tensor plain = torch::stable::empty_like(weight);
  const Tensor grad = contiguous(torch::stable::to(plain, total.scalar_type()));
  const T* in = static_cast<const T*>(total.const_data_ptr()) + begin;
  T* out = static_cast<T*>(grad.mutable_data_ptr());
  for (int64_t r = 0; r < weight.numel() / width; ++r)
    std::copy(in + r * padded_width, in + r * padded_width + width, out + r * width);
  return torch::stable::to(grad, weight.scalar_type());
}

Tensor weight_gradient(const Tensor& total, int64_t begin, int64_t width, int64_t padded_width,
                       const OptTensor& weight) {
  if (!weight) return empty(total, {0});
  const bool wide = total.scalar_type() == ScalarType::Double;
  return (wide ? &unpadded<double> : &unpadded<float>)(total, begin, width, padded_width, *weight);
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                            Tensor, Tensor>;

Backward bwd(const OptTensor& d_y, const OptTensor& d_x_in, const OptTensor& d_c,
             const OptTensor& d_z_v, const OptTensor& d_z_beta, const Tensor& y, const OptTensor& k,
             const OptTensor& v, const OptTensor& beta, const OptTensor& beta_erase,
             const OptTensor& read, const OptTensor& norm, const OptTensor& W_v,
             const OptTensor& b_v, const OptTensor& W_beta, const OptTensor& b_beta,
             const Tensor& saved_, int64_t act, double v_scale, int64_t flags) {
  const BoundaryInputs in(y, k, v, beta, beta_erase);
  const BoundaryArgs args = in.args(act, 0, 0, v_scale, flags);
  Call run(in, args, {read, norm, W_v, b_v, W_beta, b_beta}, d_x_in || d_c || d_z_v || d_z_beta);
  const OptTensor rows[] = {token_rows(d_y), token_rows(d_x_in), token_rows(d_c), token_rows(d_z_v),
                            token_rows(d_z_beta)};
  const Tensor saved = contiguous(saved_);
  const int64_t N = args.N, d = args.d, d_v = args.d_v;
  const auto made = [&](const OptTensor& t, std::initializer_list<int64_t> sizes) {
    return t ? empty(*t, sizes) : empty(saved, {0});
  };
  const Tensor dx = empty(y, {N, d, d_v}), dk = made(k, {N, d}), dv = made(v, {N, d_v}),
               dbeta = made(beta, {N}), derase = made(beta_erase, {N});
  run.call.args.saved = saved.mutable_data_ptr();
  BoundaryGrads grads{{},
                      bool(flags & kNorm),
                      rows_of(rows[0]),
                      rows_of(rows[1]),
                      rows_of(rows[2]),
                      rows_of(rows[3]),
                      rows_of(rows[4]),
                      pointer(dx),
                      pointer(dk),
                      pointer(dv),
                      pointer(dbeta),
                      pointer(derase)};
  const PaddedSums at(run.call);
  const int64_t block = std::max(kLeastBlock, (N + kMostBlocks - 1) / kMostBlocks);
  PartialSums sums(saved, N, block, at.total, boundary_scratch(run.call));
  auto* kernel = DF_CPU(boundary_bwd);
  sums.run([&](int64_t first, int64_t last, void* to, void* scratch) {
    kernel(run.call, grads, run.wide(), first, last, to, scratch);
  });
  const Tensor total = sums.total();
  const int64_t wide = run.call.padded;
  return {dx,
          dk,
          dv,
          dbeta,
          derase,
          weight_gradient(total, at.read, d * d_v, wide * d_v, read),
          weight_gradient(total, at.norm, d, wide, norm),
          weight_gradient(total, at.W_v, d, wide, W_v),
          weight_gradient(total, at.b_v, d_v, d_v, b_v),
          weight_gradient(total, at.W_beta, d, wide, W_beta),
          weight_gradient(total, at.b_beta, 1, 1, b_beta)};
}
}  // namespace
}  // namespace df::cpu

DF_IMPL(CPU, m) {
  m.impl("ddl_boundary_fwd", TORCH_BOX(&df::cpu::fwd));
  m.impl("ddl_boundary_bwd", TORCH_BOX(&df::cpu::bwd));
  m.impl("ddl_rewrite_out", TORCH_BOX(&df::cpu::rewrite_out));
}
