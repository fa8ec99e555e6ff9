// Backward of the boundary (equations in boundary.h), from Y. G = dL/dY, dc+ and dx+ as they come:
//   x = R Y again;  dc = dc+ + dz_beta W_beta (+ W_v^T dz_v);  m = gamma dc;  t = mean_i m_i x_i
//   dx = rho m - rho^3 t x + dx+ (+ W_v^T dz_v);  G^_ij = G_ij + dx_i R_ij
//   g_j = sum_i k_i G^_ij = sum k (G + R (rho m + rest)) - rho^3 t sum k R x: one round of sums
//   e_j = beta_erase g_j;  dX_ij = G^_ij - k_i e_j
//   dk_i = sum_j (G^_ij u_j - Y_ij e_j) + k_i u.e;  dk~ = s (dk - k (g.u - p.e))
//   dv = beta g;  dbeta = g.v;  dbeta_erase = -g.p (to dbeta where it is absent)
//   dR_ij = sum_n dx_i Y_ij;  dgamma = sum_n dc x rho;  dW = sum_n dz (x or c);  db = sum_n dz
//
// One persistent launch and a small one that adds the partial sums of the CTAs in their order
// (boundary_finish.cu). A CTA takes a token for each of its 1 or 2 groups of warps at once:
//   fetch   rows of Y, G, k~, dc+, dx+ by cp.async, up to two rounds ahead
//   reduce  a group its token: 2 d_v + 1 sums; then u, e and the other scalars to a table
//   apply   a thread its items of all tokens: dX, dk~ and its part of the weights' gradients
// Nothing is added by atomics: an item of the weights' gradients has one owner in a CTA, which adds
// to it in shared memory after each round. dk~, and dX unless an item is 16 bytes, are written
// where k~ and Y were, from where they leave in whole rows.
//
// Shared memory: gradients and weights as float, 4 d (2 d_v + 2) bytes each; those that do not fit
// live in the CTA's row of partial sums and in L2. Then 1 to 3 stages of a token's rows a group.
// d = 2048, d_v = 4, bfloat16: 80 KB of gradients, 64 KB of weights, 2 * 40 KB. A token that does
// not fit passes in parts, read twice.
// Registers: 128 for CTAs of 16 warps, 159 for 12 (4 features an item), 209 for 8 (8 features or 16
// channels); no spills.
// Bytes a token: 3 d_v b + 3 a a feature (b, a: bytes of the state and of k~, c). FLOPs: 18 d_v +
// 20 a feature, in some 200 instructions for 16-bit d_v = 4: with everything bound by issuing,
// about twice the time of the bytes on an H100 (counted, not timed). Where gradients of weights do
// not fit (d = 4096, d_v = 4 and above) their additions in L2 come on top.
#pragma once
#include "ddl/boundary_bwd_token.cuh"

namespace df::cuda {
template <class T>
__global__ void __launch_bounds__(kBwdWarps<T> * 32, 1)
    boundary_bwd_kernel(const __grid_constant__ BoundaryBwdLaunch p) {
  extern __shared__ uint4 dynamic[];
  const uint32_t memory = static_cast<uint32_t>(__cvta_generic_to_shared(dynamic));
  const BoundaryPlan& plan = p.plan;
  const BoundaryArgs& a = p.grads.forward;
  const int warp = threadIdx.x / 32, id = warp / plan.warps, d = int(a.d), d_v = int(a.d_v);
  const uint32_t base = memory + plan.base;
  BoundaryBackward<T> x{
      p,
      a,
      {plan.warps, id, warp % plan.warps, int(threadIdx.x % 32),
       base + id * plan.group_bytes + plan.reduction, BoundaryBackward<T>::kWidth, 0},
      base,
      bwd_slot<T>(p.grads, plan.part),
      view_of<T>(a.read, a, memory, plan.read),
      view_of<T>(a.W_v, a, memory, plan.W_v),
      view_of<T>(a.norm, a, memory, plan.norm),
      view_of<T>(a.W_beta, a, memory, plan.W_beta),
      {p, a, memory},
      a.k.data != nullptr,
      p.grads.d_y.data != nullptr,
      p.grads.d_c.data != nullptr,
      p.grads.d_x_in.data != nullptr,
      a.v_from_context};

  const int64_t step = int64_t(gridDim.x) * plan.groups;
  int64_t first = int64_t(blockIdx.x) * plan.groups;
  if (plan.parts == 1)
    for (int i = 0; i < plan.stages; ++i) x.fetch_tokens(first + i * step, i, 0);
  auto scalars = x.load_scalars(first + id);
  float bias = 0;
  stage_weights<T>(x.read, plan.items, ItemPlace<T, true>{0, d, d_v});
  stage_weights<T>(x.W_v, plan.items, ItemPlace<T, false>{0, d, d_v});
  stage_feature_weights<T>(x.norm, plan.items, d);
  stage_feature_weights<T>(x.W_beta, plan.items, d);
  if (p.partials) x.weights.clear();
  wait_copies_but(plan.stages - 1);
  __syncthreads();

  for (int i = 0; first < a.N; first += step, i = i + 1 < plan.stages ? i + 1 : 0) {
    if (first + id < a.N) {  // the same for a whole group
      const auto sums = x.reduce_token(first + id, i, scalars);
      if (x.g.warp == 0) x.conclude(first + id, scalars, sums);
    }
    scalars = x.load_scalars(first + step + id);
    __syncthreads();
    bias += x.bias_round(first);
    for (int part = 0; part < plan.parts; ++part) {
      if (plan.parts > 1) x.fetch_part(first, part);
      x.apply_round(first, i, part);
      wait_copies_but(plan.stages - 2);
      __syncthreads();  // the next round's rows are there, too
      x.flush_tokens(first, i, part);
      if (plan.parts > 1) __syncthreads();
    }
    if (plan.parts > 1) continue;
    x.fetch_tokens(first + plan.stages * step, i, 0);
    if (plan.stages == 1) {
      wait_copies<0>();
      __syncthreads();
    }
  }
  if (p.partials) {
    x.weights.store();
    x.weights.store_biases(bias);
  }
}

template <class T>
BoundaryPlan boundary_bwd_plan(const BoundaryGrads& p) {
  const int64_t table = BwdTable<T>::kFloats * sizeof(float);
  BoundaryPlanner<T> planner{p.forward, boundary_device(), kBwdWarps<T>, 64, 2, [&p](int items) {
                               return bwd_slot<T>(p, items).bytes;
                             }};
  planner.token_bytes = table;
  planner.width = BoundaryBackward<T>::kWidth;
  planner.sums = p.weights;
  if (!planner.divide()) return {};
  planner.choose();
  BoundaryPlan& plan = planner.plan;
  plan.table = plan.stages * plan.stage_bytes;
  plan.reduction = plan.table + int(table);
  planner.size_grid(boundary_bwd_kernel<T>);
  return plan;
}

template <class T>
void boundary_bwd_launch(const BoundaryGrads& grads, const BoundaryPlan& plan, float* partials,
                         void* stream) {
  const BoundaryArgs& a = grads.forward;
  const int size = sizeof(typename T::State), act = size_of(a.act);
  const int64_t state = a.d * a.d_v;
  const bool whole = a.d_v == T::kChannels;
  const bool weights = partials != nullptr;
  BoundaryBwdLaunch p{grads, plan, BoundarySums(a, weights && a.read.data, weights && a.norm.data),
                      partials};
  p.y_vectors = whole && whole_vectors(a.x, state, size);
  p.g_vectors = whole && whole_vectors(grads.d_y, state, size);
  p.k_vectors = whole_vectors(a.k, a.d, act);
  p.c_vectors = whole_vectors(grads.d_c, a.d, act);
  p.x_vectors = whole_vectors(grads.d_x_in, a.d, act);
  p.dx_vectors = whole && whole_vectors({grads.dx, state}, state, size);
  p.dk_vectors = whole_vectors({grads.dk, a.d}, a.d, act);
  p.direct = p.dx_vectors && T::kPieces == 1;
  boundary_bwd_kernel<T>
      <<<plan.grid, plan.groups * plan.warps * 32, plan.bytes, static_cast<cudaStream_t>(stream)>>>(
          p);
}

template <class E>
BoundaryPlan boundary_bwd_plan_of(const BoundaryGrads& p) {
  return with_tile<E>(p.forward.d_v,
                      [&](auto tile) { return boundary_bwd_plan<decltype(tile)>(p); });
}
template <class E>
void boundary_bwd_dispatch(const BoundaryGrads& p, const BoundaryPlan& plan, float* partials,
                           void* stream) {
  with_tile<E>(p.forward.d_v,
               [&](auto tile) { boundary_bwd_launch<decltype(tile)>(p, plan, partials, stream); });
}
}  // namespace df::cuda
