// Allocation, checks and registration of the boundary's CUDA kernels. Python has checked the
// shapes.
#include "common/cuda_shim.h"
#include "ddl/boundary_host.h"
#include "ddl/boundary_launch.h"

namespace df::cuda {
namespace {
OptTensor dense(const OptTensor& t) {
  return t ? OptTensor(contiguous(*t)) : t;
}
Weight weight(const OptTensor& t) {
  return t ? Weight{t->const_data_ptr(), dtype(*t)} : Weight{};
}

// The tensors that an operator reads; they live until the launch.
struct Inputs : BoundaryInputs {
  BoundaryWeights weights;  // contiguous

  Inputs(const BoundaryInputs& rows, const BoundaryWeights& w)
      : BoundaryInputs(rows), weights{dense(w.read), dense(w.norm),   dense(w.W_v),
                                      dense(w.b_v),  dense(w.W_beta), dense(w.b_beta)} {}

  BoundaryArgs args(int64_t act, double k_eps, double norm_eps, double v_scale,
                    int64_t flags) const {
    BoundaryArgs a = BoundaryInputs::args(act, k_eps, norm_eps, v_scale, flags);
    STD_TORCH_CHECK(a.state != DType::f64 && a.act != DType::f64,
                    "ddl: float64 states have no CUDA kernel, only the reference");
    a.read = weight(weights.read), a.norm = weight(weights.norm);
    a.W_v = weight(weights.W_v), a.b_v = weight(weights.b_v);
    a.W_beta = weight(weights.W_beta), a.b_beta = weight(weights.b_beta);
    return a;
  }
};

void forward(const BoundaryArgs& a, const Launch& launch) {
  bool fits = false;
  switch (a.state) {
    case DType::f32: fits = boundary_fwd_f32_cuda(a, launch.stream()); break;
    case DType::bf16: fits = boundary_fwd_bf16_cuda(a, launch.stream()); break;
    default: fits = boundary_fwd_f16_cuda(a, launch.stream());
  }
  STD_TORCH_CHECK(fits, "ddl: d = ", a.d, " is too large for the shared memory of this GPU");
  launch.check();
}

BoundaryPlan backward_plan(const BoundaryGrads& p) {
  const BoundaryPlan plan = p.forward.state == DType::f32    ? boundary_bwd_plan_f32_cuda(p)
                            : p.forward.state == DType::bf16 ? boundary_bwd_plan_bf16_cuda(p)
                                                             : boundary_bwd_plan_f16_cuda(p);
  STD_TORCH_CHECK(plan.parts > 0, "ddl: d = ", p.forward.d,
                  " is too large for the shared memory of this GPU");
  return plan;
}
void backward(const BoundaryGrads& p, const BoundaryPlan& plan, float* partials, void* stream) {
  switch (p.forward.state) {
    case DType::f32: return boundary_bwd_f32_cuda(p, plan, partials, stream);
    case DType::bf16: return boundary_bwd_bf16_cuda(p, plan, partials, stream);
    default: return boundary_bwd_f16_cuda(p, plan, partials, stream);
  }
}

void check_gradients(const BoundaryArgs& a, const OptTensor& d_y, const OptTensor& d_x_in,
                     const OptTensor& d_c, const OptTensor& d_z_v, const OptTensor& d_z_beta) {
  const auto check = [](const OptTensor& t, DType type) {
    STD_TORCH_CHECK(!t || dtype(*t) == type, "ddl: a gradient does not have its tensor's type");
  };
  check(d_y, a.state), check(d_x_in, a.act), check(d_c, a.act);
  check(d_z_v, DType::f32), check(d_z_beta, DType::f32);
}

// Results of the backward, empty where the forward had nothing.
struct Grads {
  Tensor dx, dk, dv, dbeta, dbeta_erase;
  Tensor read, norm, W_v, b_v, W_beta, b_beta;

  Grads(const Inputs& in) : dx(empty(in.x, {in.x.size(0), in.x.size(1), in.x.size(2)})) {
    const BoundaryWeights& w = in.weights;
    dk = like(in.k), dv = like(in.v), dbeta = like(in.beta), dbeta_erase = like(in.beta_erase);
    read = like(w.read), norm = like(w.norm), W_v = like(w.W_v), b_v = like(w.b_v);
    W_beta = like(w.W_beta), b_beta = like(w.b_beta);
  }
  Tensor like(const OptTensor& t) const {
    if (!t) return empty(dx, {0});
    if (t->dim() == 1) return empty(*t, {t->size(0)});
    return empty(*t, {t->size(0), t->size(1)});
  }
  BoundaryFinish finish(const BoundarySums& sums) const {
    BoundaryFinish p{};
    p.total = sums.total, p.stride = boundary_partial_stride(sums);
    const int64_t ends[] = {sums.norm, sums.W_v, sums.b_v, sums.W_beta, sums.b_beta, sums.total};
    const Tensor* const all[] = {&read, &norm, &W_v, &b_v, &W_beta, &b_beta};
    for (int i = 0; i < kBoundaryGradients; ++i) {
      const int64_t begin = i ? ends[i - 1] : sums.read;
      if (all[i]->numel() > 0)
        p.grads[i] = {all[i]->mutable_data_ptr(), dtype(*all[i]), begin, ends[i] - begin};
    }
    return p;
  }
};
}  // namespace

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

static Forward boundary_fwd(const Tensor& x, const OptTensor& k, const OptTensor& v,
                            const OptTensor& beta, const OptTensor& beta_erase,
                            const OptTensor& read, const OptTensor& norm, const OptTensor& W_v,
                            const OptTensor& b_v, const OptTensor& W_beta, const OptTensor& b_beta,
                            int64_t act, double k_eps, double norm_eps, double v_scale,
                            int64_t flags) {
  const Inputs in({x, k, v, beta, beta_erase}, {read, norm, W_v, b_v, W_beta, b_beta});
  BoundaryArgs a = in.args(act, k_eps, norm_eps, v_scale, flags);
  const auto made = [&](bool wanted, std::initializer_list<int64_t> sizes, ScalarType type) {
    return wanted ? empty(x, sizes, type) : empty(x, {0}, type);
  };
  const ScalarType out = scalar_type(act);
  const Tensor y = made(bool(k), {a.N, a.d, a.d_v}, x.scalar_type());
  const Tensor x_in = made(flags & kXIn, {a.N, a.d}, out), c = made(flags & kNorm, {a.N, a.d}, out);
  const Tensor z_v = made(bool(W_v), {a.N, a.d_v}, ScalarType::Float);
  const Tensor z_beta = made(bool(W_beta), {a.N}, ScalarType::Float);
  const Tensor saved = made(flags & kSave, {a.N, a.d_v + 2}, ScalarType::Float);
  if (a.N > 0) {
    a.y = pointer(y), a.x_in = pointer(x_in), a.c = pointer(c);
    a.z_v = pointer(z_v), a.z_beta = pointer(z_beta), a.saved = pointer(saved);
    const BoundaryWeights& w = in.weights;
    const Launch launch(in.x, in.k, in.v, in.beta, in.beta_erase, w.read, w.norm, w.W_v, w.b_v,
                        w.W_beta, w.b_beta, y, x_in, c, z_v, z_beta, saved);
    forward(a, launch);
  }
  return {y, x_in, c, z_v, z_beta, saved};
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                            Tensor, Tensor>;

static Backward boundary_bwd(const OptTensor& d_y, const OptTensor& d_x_in, const OptTensor& d_c,
                             const OptTensor& d_z_v, const OptTensor& d_z_beta, const Tensor& y,
                             const OptTensor& k, const OptTensor& v, const OptTensor& beta,
                             const OptTensor& beta_erase, const OptTensor& read,
                             const OptTensor& norm, const OptTensor& W_v, const OptTensor& b_v,
                             const OptTensor& W_beta, const OptTensor& b_beta, const Tensor& saved,
                             int64_t act, double v_scale, int64_t flags) {
  const Inputs in({y, k, v, beta, beta_erase}, {read, norm, W_v, b_v, W_beta, b_beta});
  BoundaryGrads p{};
  p.forward = in.args(act, 0, 0, v_scale, flags);
  check_gradients(p.forward, d_y, d_x_in, d_c, d_z_v, d_z_beta);
  BoundaryArgs& a = p.forward;
  const BoundaryWeights& w = in.weights;
  const Grads grads(in);
  p.norm = flags & kNorm;
  p.weights = w.read || w.norm || w.W_v || w.W_beta;
  const BoundarySums sums(a, bool(w.read), bool(w.norm));
  Tensor partials = empty(y, {0}, ScalarType::Float);
  BoundaryFinish last = grads.finish(sums);
  if (a.N > 0) {
    const OptTensor g_y = token_rows(d_y), g_x_in = token_rows(d_x_in), g_c = token_rows(d_c),
                    g_z_v = token_rows(d_z_v);
    p.d_y = rows_of(g_y), p.d_x_in = rows_of(g_x_in), p.d_c = rows_of(g_c);
    p.d_z_v = rows_of(g_z_v), p.d_z_beta = rows_of(d_z_beta);
    const Tensor scalars = contiguous(saved);
    a.saved = scalars.mutable_data_ptr();
    p.dx = pointer(grads.dx), p.dk = pointer(grads.dk), p.dv = pointer(grads.dv);
    p.dbeta = pointer(grads.dbeta), p.dbeta_erase = pointer(grads.dbeta_erase);
    const BoundaryPlan plan = backward_plan(p);
    if (p.weights) partials = empty(y, {plan.grid, last.stride}, ScalarType::Float);
    last.rows = plan.grid;
    const Launch launch(in.x, in.k, in.v, in.beta, in.beta_erase, w.read, w.norm, w.W_v, w.W_beta,
                        g_y, g_x_in, g_c, g_z_v, d_z_beta, scalars, partials, grads.dx, grads.dk,
                        grads.dv, grads.dbeta, grads.dbeta_erase);
    backward(p, plan, static_cast<float*>(pointer(partials)), launch.stream());
    launch.check();
  }
  if (p.weights) {
    const Launch launch(partials, grads.read, grads.norm, grads.W_v, grads.b_v, grads.W_beta,
                        grads.b_beta);
    last.partials = static_cast<const float*>(pointer(partials));
    boundary_finish_cuda(last, launch.stream());
    launch.check();
  }
  return {grads.dx,   grads.dk,  grads.dv,  grads.dbeta,  grads.dbeta_erase, grads.read,
          grads.norm, grads.W_v, grads.b_v, grads.W_beta, grads.b_beta};
}

static void rewrite_out(const Tensor& x, const Tensor& k, const Tensor& v, const Tensor& beta,
                        const OptTensor& beta_erase, const Tensor& out, double k_eps,
                        double v_scale, int64_t flags) {
  expect_out(out, x);
  const Inputs in({x, k, v, beta, beta_erase}, {});
  BoundaryArgs a = in.args(int64_t(dtype(k)), k_eps, 0, v_scale, flags);
  if (a.N == 0) return;
  a.y = out.mutable_data_ptr();
  const Launch launch(in.x, in.k, in.v, in.beta, in.beta_erase, out);
  forward(a, launch);
}
}  // namespace df::cuda

DF_IMPL(DF_CUDA, m) {
  m.impl("ddl_boundary_fwd", TORCH_BOX(&df::cuda::boundary_fwd));
  m.impl("ddl_boundary_bwd", TORCH_BOX(&df::cuda::boundary_bwd));
  m.impl("ddl_rewrite_out", TORCH_BOX(&df::cuda::rewrite_out));
}
