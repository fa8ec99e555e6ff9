// What the CPU operators share on the host side: sequences, tasks, padding, partial sums.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "common/cpu/subnormals.h"
#include "gated_delta/chunk.h"
#include "gated_delta/input_host.h"

namespace df::cpu {
inline std::vector<Sequence> sequences_of(const Tensor& q, const OptTensor& cu_seqlens) {
  std::vector<Sequence> all;
  if (!cu_seqlens) {
    for (int64_t b = 0; b < q.size(0); ++b) all.push_back({b, 0, q.size(1)});
    return all;
  }
  const Tensor offsets = torch::stable::contiguous(*cu_seqlens);
  const bool wide = offsets.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || offsets.scalar_type() == ScalarType::Int,
                  "gated_delta: cu_seqlens must be int32 or int64");
  const auto at = [&](int64_t i) {
    return wide ? static_cast<const int64_t*>(offsets.const_data_ptr())[i]
                : int64_t(static_cast<const int32_t*>(offsets.const_data_ptr())[i]);
  };
  STD_TORCH_CHECK(offsets.numel() > 0 && at(0) == 0, "gated_delta: cu_seqlens must start with 0");
  for (int64_t i = 1; i < offsets.numel(); ++i) {
    STD_TORCH_CHECK(at(i - 1) <= at(i) && at(i) <= q.size(1), "gated_delta: cu_seqlens[", i,
                    "] = ", at(i), " after ", at(i - 1), ", with ", q.size(1), " tokens");
    all.push_back({0, at(i - 1), at(i)});
  }
  return all;
}

// Workers draw tasks, longest sequence first; each has a zeroed scratch of its own. `cost`, the
// multiply-adds of a token and value column, keeps threads from being woken for less than they do
// in ten microseconds.
constexpr int64_t kLeastWork = 1 << 17;

template <class Run>
void run_tasks(std::vector<ChunkTask> tasks, const std::vector<Sequence>& sequences, int64_t bytes,
               int64_t cost, Run run) {
  const auto length = [&](const ChunkTask& t) {
    return sequences[t.sequence].end - sequences[t.sequence].begin;
  };
  std::stable_sort(tasks.begin(), tasks.end(),
                   [&](const ChunkTask& a, const ChunkTask& b) { return length(a) > length(b); });
  int64_t work = 0;
  for (const ChunkTask& t : tasks) work += length(t) * (t.last - t.first) * (t.v1 - t.v0) * cost;
  const int64_t count = int64_t(tasks.size()), threads = torch::stable::get_num_threads();
  const int64_t workers = std::min({threads, count, 1 + work / kLeastWork});
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t w = begin; w < end; ++w) {
      std::unique_ptr<void, decltype(&std::free)> block(std::calloc(bytes + 64, 1), &std::free);
      STD_TORCH_CHECK(block, "gated_delta: no memory for ", bytes, " bytes of scratch");
      advise_huge_pages(block.get(), bytes);
      const FlushSubnormals flush;
      void* scratch = reinterpret_cast<void*>((uintptr_t(block.get()) + 63) & ~uintptr_t(63));
      for (int64_t i; (i = next.fetch_add(1)) < count;) run(tasks[i], scratch);
    }
  });
}

// Zeroes the tokens behind the last sequence of a contiguous [1,T,...].
inline void zero_padding(const Tensor& t, int64_t covered) {
  if (covered == t.size(1) || t.numel() == 0) return;
  const int64_t row = t.numel() / t.size(1) * int64_t(t.element_size());
  std::memset(static_cast<char*>(t.mutable_data_ptr()) + covered * row, 0,
              (t.size(1) - covered) * row);
}

// [HV] from one partial sum a sequence, in their order.
inline Tensor sum_over_sequences(const std::vector<double>& partial, const Tensor& like,
                                 int64_t HV) {
  const Tensor total = empty(like, {HV}, ScalarType::Double);
  double* to = static_cast<double*>(total.mutable_data_ptr());
  std::fill(to, to + HV, 0.0);
  for (size_t i = 0; i < partial.size(); ++i) to[i % HV] += partial[i];
  return torch::stable::to(total, like.scalar_type());
}
}  // namespace df::cpu
