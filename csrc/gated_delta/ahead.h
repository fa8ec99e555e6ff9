// Prefetching what a worker will load next, a few lines at a time inside the products: rows of a
// head lie too far apart for the hardware to guess the next one, and a burst of more lines than a
// core has fill buffers (16) would stop it.
#pragma once
#include "gated_delta/input.h"

namespace df::cpu::DF_ISA {
namespace {
class Ahead {
 public:
  // Rows [begin, begin + rows) of a head, n columns from the given one on; they need not exist.
  void add(const Input& x, int64_t batch, int64_t begin, int64_t head, int64_t rows, int64_t column,
           int64_t n) {
    int64_t size = 0;
    dispatch(x.dtype, [&](auto tag) { size = sizeof(typename decltype(tag)::type); });
    const auto* data = static_cast<const char*>(x.data);
    add({data + (x.at(batch, begin, head) + column) * size, x.t * size, rows, n * size});
  }
  void add(const void* data, int64_t bytes) { add({static_cast<const char*>(data), 0, 1, bytes}); }
  // About how many times some() will be called.
  void pace(int64_t calls) { each_ = (lines_ + calls - 1) / calls; }

  [[gnu::always_inline]] inline void some() {
    for (int64_t line = 0; line < each_ && count_ > 0; ++line) {
      Panel& p = panels_[count_ - 1];
      __builtin_prefetch(p.at + byte_, 0, 2);
      byte_ += 64;
      if (byte_ < p.bytes) continue;
      byte_ = 0, p.at += p.stride;
      if (--p.rows == 0) --count_;
    }
  }

 private:
  struct Panel {
    const char* at;
    int64_t stride, rows, bytes;
  };
  void add(Panel p) {
    panels_[count_++] = p;
    lines_ += p.rows * ((p.bytes + 63) / 64);
  }
  static constexpr int kPanels = 4;
  Panel panels_[kPanels];
  int count_ = 0;
  int64_t byte_ = 0, lines_ = 0, each_ = 0;
};
}  // namespace
}  // namespace df::cpu::DF_ISA
