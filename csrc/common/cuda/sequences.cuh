// Which sequence a token is in.
#pragma once
#include <cstdint>

#include "common/sequences.h"

namespace df::cuda {
struct Span {  // tokens [first, last) of a row; n == N: those behind the last sequence
  int64_t n, first, last;
};

__device__ inline int64_t offset_at(const Offsets& o, int64_t i) {
  const int64_t at = o.wide ? static_cast<const int64_t*>(o.data)[i]
                            : int64_t(static_cast<const int32_t*>(o.data)[i]);
  return at < 0 ? 0 : at < o.T ? at : o.T;  // whatever they say, no access leaves the row
}
__device__ inline Span sequence(const Offsets& o, int64_t n) {
  if (!o.data) return {n, 0, o.T};
  const int64_t first = offset_at(o, n), last = offset_at(o, n + 1);
  return {n, first, last < first ? first : last};
}
// The sequence that holds token t of row b; empty ones hold none.
__device__ inline Span span_of(const Offsets& o, int64_t b, int64_t t) {
  if (!o.data) return {b, 0, o.T};
  int64_t low = 0, high = o.N + 1;  // the first offset beyond t is in [low, high]
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    offset_at(o, middle) > t ? high = middle : low = middle + 1;
  }
  if (low == 0) return {o.N, 0, offset_at(o, 0)};  // only where the offsets do not start with 0
  return {low - 1, offset_at(o, low - 1), low > o.N ? o.T : offset_at(o, low)};
}
}  // namespace df::cuda
