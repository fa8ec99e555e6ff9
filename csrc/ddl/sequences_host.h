// What the time mixing operators share on the host side: rows of tokens, sequences, zeroed padding.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "common/sequences_host.h"

namespace df {
// t with the dimensions from 2 on contiguous: itself, or a copy.
inline Tensor dense_tokens(const Tensor& t) {
  int64_t stride = 1;
  for (int64_t i = t.dim() - 1; i >= 2; --i) {
    if (t.size(i) != 1 && t.stride(i) != stride) return contiguous(t);
    stride *= t.size(i);
  }
  return t;
}

namespace cpu {
struct Sequence {  // tokens [first, last) of a row
  int64_t batch, first, last;
};

inline std::vector<Sequence> sequences_of(const char* op, const Tensor& x,
                                          const OptTensor& cu_seqlens) {
  std::vector<Sequence> all;
  if (!cu_seqlens) {
    for (int64_t b = 0; b < x.size(0); ++b) all.push_back({b, 0, x.size(1)});
    return all;
  }
  const Tensor offsets = as(*cu_seqlens, ScalarType::Long);
  const int64_t* at = static_cast<const int64_t*>(offsets.const_data_ptr());
  STD_TORCH_CHECK(offsets.numel() > 0 && at[0] == 0, op, ": cu_seqlens must start with 0");
  for (int64_t i = 1; i < offsets.numel(); ++i) {
    STD_TORCH_CHECK(at[i - 1] <= at[i] && at[i] <= x.size(1), op, ": cu_seqlens[", i, "] = ", at[i],
                    " after ", at[i - 1], ", with ", x.size(1), " tokens");
    all.push_back({0, at[i - 1], at[i]});
  }
  return all;
}

// Zeroes the tokens behind the last sequence of a contiguous packed [1,T,...].
inline void zero_behind(const Tensor& t, const std::vector<Sequence>& sequences,
                        const OptTensor& cu_seqlens) {
  if (!cu_seqlens || t.numel() == 0) return;
  const int64_t covered = sequences.empty() ? 0 : sequences.back().last;
  const int64_t row = t.numel() / t.size(1) * int64_t(t.element_size());
  std::memset(static_cast<char*>(t.mutable_data_ptr()) + covered * row, 0,
              (t.size(1) - covered) * row);
}

using Memory = std::unique_ptr<void, decltype(&std::free)>;
inline Memory zeroed(int64_t bytes) {
  Memory memory(std::calloc(bytes, 1), &std::free);
  STD_TORCH_CHECK(memory, "no memory for ", bytes, " bytes of scratch");
  return memory;
}
}  // namespace cpu
}  // namespace df
