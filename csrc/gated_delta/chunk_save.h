// What a chunk of a value head leaves to its backward. By streaming stores if the backward is
// another call: nothing of it stays in the cache till then.
#pragma once
#include "common/cpu/stream.h"
#include "common/cpu/transpose.h"
#include "gated_delta/chunk_steps.h"

namespace df::cpu::DF_ISA {
namespace {
template <bool streaming>
struct Save {
  template <class T>
  void operator()(T* p, Vec<T> v) const {
    streaming ? stream(p, v) : store(p, v);
  }
};

// S^T of a tile of columns.
template <bool streaming, class T>
void save_state(const ChunkShape& s, const T* S, int64_t ld, T* to) {
  transpose(S, ld, s.K, ld, to, SavedLayout(s).K, Save<streaming>{});
}

// Rows of E, a tile of columns.
template <bool streaming, class T>
void save_rows(const T* e, int64_t ld, int64_t rows, T* to, int64_t ld_to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < ld; c += kLanes<T>)
      Save<streaming>{}(to + i * ld_to + c, load(e + i * ld + c));
}
}  // namespace
}  // namespace df::cpu::DF_ISA
