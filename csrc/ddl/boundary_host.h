// Tensors to the arguments of the boundary, for both devices' host code.
#pragma once
#include "common/op.h"
#include "ddl/boundary.h"

namespace df {
// In the order of python/deltafuse/ddl/raw.py.
enum BoundaryFlag : int64_t {
  kVLogits = 1,
  kBetaLogits = 2,
  kNormalizeK = 4,
  kVFromContext = 8,
  kXIn = 16,
  kNorm = 32,
  kSave = 64
};

inline ScalarType scalar_type(int64_t type) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16,
                                   ScalarType::Half};
  STD_TORCH_CHECK(type >= 0 && type < 4, "ddl: unknown dtype ", type);
  return kTypes[type];
}

// [N, ...] with any stride between tokens, but each token's elements contiguous.
inline Tensor token_rows(const Tensor& t) {
  int64_t expected = 1;
  for (int64_t i = t.dim() - 1; i > 0; --i) {
    if (t.size(i) != 1 && t.stride(i) != expected) return contiguous(t);
    expected *= t.size(i);
  }
  return t;
}
inline OptTensor token_rows(const OptTensor& t) {
  return t ? OptTensor(token_rows(*t)) : t;
}
inline TokenRows rows_of(const OptTensor& t) {
  return t ? TokenRows{t->const_data_ptr(), t->stride(0)} : TokenRows{};
}

struct BoundaryWeights {
  OptTensor read, norm, W_v, b_v, W_beta, b_beta;
};

// Keeps alive what the arguments point to; x is the state that the pass reads.
struct BoundaryInputs {
  Tensor x;
  OptTensor k, v, beta, beta_erase;

  BoundaryInputs(const Tensor& x_, const OptTensor& k_, const OptTensor& v_, const OptTensor& beta_,
                 const OptTensor& erase_)
      : x(token_rows(x_)),
        k(token_rows(k_)),
        v(token_rows(v_)),
        beta(token_rows(beta_)),
        beta_erase(token_rows(erase_)) {
    STD_TORCH_CHECK(x.dim() == 3 && x.size(2) >= 1 && x.size(2) <= kMaxChannels,
                    "ddl: x must be [N, d, d_v] with d_v in 1..", kMaxChannels);
    const int64_t N = x.size(0), d = x.size(1), d_v = x.size(2);
    const auto fits = [&](const OptTensor& t, int64_t columns) {
      return t && t->size(0) == N &&
             (columns ? t->dim() == 2 && t->size(1) == columns : t->dim() == 1);
    };
    const auto gate = [&](const OptTensor& t) { return t->scalar_type() == compute_type(x); };
    if (!k) return;
    STD_TORCH_CHECK(fits(k, d) && fits(v, d_v) && fits(beta, 0) && gate(v) && gate(beta),
                    "ddl: k must be [N, d], v [N, d_v] and beta [N] in the compute type");
    STD_TORCH_CHECK(compute_type(*k) == compute_type(x), "ddl: x and k must share a compute type");
    STD_TORCH_CHECK(!beta_erase || (fits(beta_erase, 0) && gate(beta_erase)),
                    "ddl: beta_erase must be [N] in the compute type");
  }

  BoundaryArgs args(int64_t act, double k_eps, double norm_eps, double v_scale,
                    int64_t flags) const {
    BoundaryArgs p{};
    p.N = x.size(0), p.d = x.size(1), p.d_v = x.size(2);
    p.state = dtype(x), p.act = DType(act);
    p.v_logits = flags & kVLogits, p.beta_logits = flags & kBetaLogits;
    p.normalize_k = flags & kNormalizeK, p.v_from_context = flags & kVFromContext;
    p.k_eps = k_eps, p.norm_eps = norm_eps, p.v_scale = v_scale;
    p.x = rows_of(x), p.k = rows_of(k), p.v = rows_of(v), p.beta = rows_of(beta);
    p.beta_erase = rows_of(beta_erase);
    STD_TORCH_CHECK(!k || dtype(*k) == p.act, "ddl: k must be of the dtype `act`");
    return p;
  }
};

inline void expect_out(const Tensor& out, const Tensor& x) {
  STD_TORCH_CHECK(
      out.is_contiguous() && out.numel() == x.numel() && out.scalar_type() == x.scalar_type(),
      "ddl_rewrite_out: out must be contiguous, of the shape and dtype of x");
}
inline void* pointer(const Tensor& t) {
  return t.numel() ? t.mutable_data_ptr() : nullptr;
}
}  // namespace df
