// The boundary as the CPU kernels see it: weights in the compute type, rows of d padded with zeros
// to whole 64 bytes, so that kernels know no tails.
#pragma once
#include "common/isa.h"
#include "ddl/boundary.h"

namespace df {
struct BoundaryCpu {
  BoundaryArgs args;
  int64_t padded;  // d, rounded up
  bool read_out;   // whether anything behind Y is wanted
  bool stream;     // Y goes past the caches
};

// Elements of the compute type that a worker needs.
inline int64_t boundary_scratch(const BoundaryCpu& p) {
  return p.padded * (3 * p.args.d_v + 8);
}

// Sums over tokens for the gradients of the weights, one after the other in an array of `total`
// elements of the compute type; each starts at a whole 64 bytes.
struct PaddedSums {
  int64_t read, norm, W_v, W_beta, b_v, b_beta, total;

  PaddedSums(const BoundaryCpu& p)
      : read(0),
        norm(p.padded * p.args.d_v),
        W_v(norm + p.padded),
        W_beta(W_v + p.padded * p.args.d_v),
        b_v(W_beta + p.padded),
        b_beta(b_v + kMaxChannels),
        total(b_beta + kMaxChannels) {}
};

namespace cpu {
// Tokens [first, last). `wide`: the compute type is double. sums: PaddedSums, added to.
DF_DECLARE_CPU(boundary_fwd, const BoundaryCpu&, bool wide, int64_t first, int64_t last,
               void* scratch)
DF_DECLARE_CPU(boundary_bwd, const BoundaryCpu&, const BoundaryGrads&, bool wide, int64_t first,
               int64_t last, void* sums, void* scratch)
}  // namespace cpu
}  // namespace df
