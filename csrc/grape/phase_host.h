// Tensors to the arguments of the contextual phase, for both devices' host code.
#pragma once
#include "common/op.h"
#include "grape/phase.h"

namespace df {
struct PhaseInputs {  // keeps alive what the arguments point to
  Tensor in;
  OptTensor cu_seqlens, initial;

  PhaseInputs(const Tensor& in_, const OptTensor& cu_, const OptTensor& initial_)
      : in(in_),
        cu_seqlens(cu_ ? OptTensor(contiguous(*cu_)) : cu_),
        initial(initial_ ? OptTensor(contiguous(*initial_)) : initial_) {
    STD_TORCH_CHECK(in.dim() == 3, "grape_phase: omega must be [B, T, M]");
    STD_TORCH_CHECK(!cu_seqlens || (in.size(0) == 1 && cu_seqlens->numel() > 0),
                    "grape_phase: cu_seqlens needs B = 1");
    STD_TORCH_CHECK(!initial || (initial->scalar_type() == ScalarType::Long &&
                                 initial->numel() == N() * in.size(2)),
                    "grape_phase: initial must be int64 [N, M]");
  }
  int64_t N() const { return cu_seqlens ? cu_seqlens->numel() - 1 : in.size(0); }

  PhaseArgs args(const Tensor& out) const {
    PhaseArgs p{};
    p.B = in.size(0), p.T = in.size(1), p.M = in.size(2), p.N = N();
    p.in = in.const_data_ptr(), p.type = dtype(in);
    p.b = in.stride(0), p.t = in.stride(1), p.m = in.stride(2);
    p.cu_seqlens = data(cu_seqlens);
    p.cu64 = cu_seqlens && cu_seqlens->scalar_type() == ScalarType::Long;
    p.initial = static_cast<const int64_t*>(data(initial));
    p.out = out.mutable_data_ptr<double>();
    return p;
  }
  Tensor made() const {
    return empty(in, {in.size(0), in.size(1), in.size(2)}, ScalarType::Double);
  }
};
}  // namespace df
