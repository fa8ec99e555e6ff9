// The seam of Deep Delta Learning's residual boundary: per token, a rank-1 rewrite of the state X
// [d, d_v], then the read-out, norm and projections that the next sub-layer starts from.
//   rewrite   s = (sum k~^2 + k_eps^2)^-1/2,  k = s k~,  p_j = sum_i k_i X_ij,
//             u_j = beta v_j - beta_erase p_j,  Y_ij = X_ij + k_i u_j
//   read-out  x_i = sum_j R_ij Y_ij,  rho = (mean x^2 + norm_eps)^-1/2,  c_i = gamma_i x_i rho
//             z_v = W_v (x or c) + b_v,  z_beta = W_beta c + b_beta
#pragma once
#include "common/dtype.h"

namespace df {
constexpr int kMaxChannels = 16;

struct TokenRows {  // [N, ...], each token's row contiguous
  const void* data = nullptr;
  int64_t stride = 0;  // elements from token to token
};
struct Weight {  // contiguous; null: absent
  const void* data = nullptr;
  DType type = DType::f32;
};

struct BoundaryArgs {
  int64_t N, d, d_v;
  DType state, act;  // of X and Y; of k~, x and c. All other rows are in the compute type
  bool v_logits;     // v = v_scale sigmoid(v)
  bool beta_logits;  // beta = 2 sigmoid(beta)
  bool normalize_k;  // else k = k~
  bool v_from_context;
  double k_eps, norm_eps, v_scale;
  TokenRows x;                            // [N, d, d_v]
  TokenRows k;                            // [N, d]; null: no rewrite, Y = X
  TokenRows v, beta, beta_erase;          // [N, d_v], [N], [N]; beta_erase null: beta
  Weight read;                            // [d, d_v]; null: the mean over channels
  Weight norm, W_v, b_v, W_beta, b_beta;  // [d], [d_v, d], [d_v], [1, d], [1]; norm null: ones
  // Results, contiguous; null: not wanted.
  void *y, *x_in, *c;  // [N, d, d_v], [N, d], [N, d]
  void *z_v, *z_beta;  // [N, d_v], [N]
  void* saved;         // [N, d_v + 2]: s, rho, p
};

// Backward. `forward` as it was, but x is Y and the results are null; saved is read.
struct BoundaryGrads {
  BoundaryArgs forward;
  bool norm;                                    // c was a result: rho is in saved
  TokenRows d_y, d_x_in, d_c, d_z_v, d_z_beta;  // null: zero
  // Results, contiguous; null: not wanted.
  void *dx, *dk;                   // [N, d, d_v], [N, d]
  void *dv, *dbeta, *dbeta_erase;  // [N, d_v], [N], [N]: of v and beta as they were given
  bool weights;                    // whether any gradient of a weight is wanted
};
}  // namespace df
