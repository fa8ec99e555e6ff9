// Sums over rows whose bits do not depend on the thread count: blocks of a fixed number of rows
// have a partial sum each, and these are added in their order.
#pragma once
#include <algorithm>
#include <cstring>

#include "common/cpu/subnormals.h"
#include "common/op.h"

namespace df::cpu {
inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  const Tensor t = empty(like, sizes, type);
  if (t.numel()) std::memset(t.mutable_data_ptr(), 0, t.numel() * t.element_size());
  return t;
}

template <class T>
void add_blocks(const void* from, int64_t blocks, int64_t columns, void* to) {
  const T* in = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  parallel_for(0, columns, 4096, [&](int64_t begin, int64_t end) {
    std::vector<double> total(end - begin);
    for (int64_t u = 0; u < blocks; ++u)
      for (int64_t c = begin; c < end; ++c) total[c - begin] += in[u * columns + c];
    for (int64_t c = begin; c < end; ++c) out[c] = T(total[c - begin]);
  });
}

// [columns] from partial sums [blocks, columns] of the compute type.
inline Tensor sum_blocks(const Tensor& partial, int64_t columns) {
  const Tensor total = empty(partial, {columns});
  const bool wide = partial.scalar_type() == ScalarType::Double;
  (wide ? &add_blocks<double> : &add_blocks<float>)(partial.const_data_ptr(), partial.size(0),
                                                    columns, total.mutable_data_ptr());
  return total;
}

class CacheLines {  // memory of a worker that begins on a cache line
 public:
  explicit CacheLines(int64_t bytes) : bytes_(bytes + 64) {}
  void* data() const {
    return reinterpret_cast<void*>((uintptr_t(bytes_.data()) + 63) & ~uintptr_t(63));
  }

 private:
  std::vector<char> bytes_;
};

class PartialSums {  // of `columns` numbers over `rows` rows, in the compute type of `like`
 public:
  PartialSums(const Tensor& like, int64_t rows, int64_t block, int64_t columns)
      : PartialSums(like, rows, block, columns, columns) {}
  PartialSums(const Tensor& like, int64_t rows, int64_t block, int64_t columns, int64_t scratch)
      : rows_(rows),
        block_(block),
        columns_(columns),
        scratch_(scratch),
        partial_(zeros(like, {(rows + block - 1) / block, columns}, compute_type(like))) {}

  // fn(first row, last row, partial sum, scratch on a cache line)
  template <class Fn>
  void run(Fn fn) {
    const int64_t bytes = columns_ * int64_t(partial_.element_size());
    char* sums = static_cast<char*>(partial_.mutable_data_ptr());
    parallel_for(0, partial_.size(0), 1, [&](int64_t begin, int64_t end) {
      const CacheLines scratch(scratch_ * int64_t(partial_.element_size()));
      const FlushSubnormals flush;
      for (int64_t i = begin; i < end; ++i)
        fn(i * block_, std::min((i + 1) * block_, rows_), sums + i * bytes, scratch.data());
    });
  }
  Tensor total() const { return sum_blocks(partial_, columns_); }

 private:
  int64_t rows_, block_, columns_, scratch_;
  Tensor partial_;
};
}  // namespace df::cpu
