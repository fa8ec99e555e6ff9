// Between the host and the CUDA kernels of the MARS family: a table of tensors and sections, what
// all tensors share, and the layout of the workspace. Knows neither torch nor CUDA.
#pragma once
#include "mars/mars.h"

namespace df {
// Elements of one work item and one partial sum: 8 quanta for each of 7 warps. At the end CTAs wait
// for each other as long as an item takes.
constexpr int64_t kMarsCudaChunk = 56 * kMarsQuantum;

// How a tensor's arrays are accessed: all are aligned for vectors of 4 elements (2 in float64); of
// plain tensors they are also float32, there is none beside p, g, m, v and h, the rule is AdamW.
enum class MarsAccess : uint8_t { single, vectors, plain };

// A tensor and its place in the work list. Items are chunks of kMarsCudaChunk elements; group j
// is norm(tensor j), count(tensor j - 1), update(tensor j - lag), each absent where not needed.
struct MarsEntry {
  MarsTensor tensor;
  float* step;    // null: nothing depends on it
  int32_t first;  // item that group j starts with; the table ends with `lag` empty entries
  int32_t part;   // its first partial sum
  int32_t chunks;
  bool norm, count;  // has items that give partial sums, that count agreeing elements
  bool counts_steps;
  MarsAccess access;
};

struct MarsInput {  // one number in device memory; no data: a default
  const void* data;
  DType type;
};

// Of tensors with one compute type. The table is entries[tensors + lag], then sections[sections].
struct MarsLaunch {
  int32_t tensors, lag, sections, items, parts;
  MarsInput grad_scale, found_inf;
  const double *schedule, *norms;  // [sections, 3] and [params], or null
  double* squares;                 // [params]: norms alone are wanted
  uint64_t seed;
  void* workspace;
};

struct MarsCounters {
  uint32_t ticket, done;
};
struct MarsProgress {  // of a tensor
  uint32_t arrived;    // chunks whose partial sum is there; one more: `square` is
  uint32_t counted;    // chunks that were added to `agreeing`
  uint64_t agreeing;
  double square;
};

// The workspace: counters and progress, which start as zeros; partial sums; the table, where it is
// too large for the kernel's arguments.
constexpr int64_t kMarsTableBytes = 32000;  // of 32764 for all arguments
constexpr int64_t kMarsCountersBytes = 16;
constexpr int64_t mars_zeroed_bytes(const MarsLaunch& x) {
  return kMarsCountersBytes + x.tensors * int64_t(sizeof(MarsProgress));
}
constexpr int64_t mars_table_offset(const MarsLaunch& x) {
  return (mars_zeroed_bytes(x) + x.parts * 8 + 15) / 16 * 16;
}
constexpr int64_t mars_table_bytes(const MarsLaunch& x) {
  return (x.tensors + x.lag) * int64_t(sizeof(MarsEntry)) + x.sections * sizeof(MarsSection);
}

// wide: the compute type is double. With x.squares the norms alone.
void mars_cuda(const MarsLaunch& x, const void* table, bool wide, void* stream);
}  // namespace df
