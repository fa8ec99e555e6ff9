// Walks a row of any length by vectors: the last, incomplete one is moved through a buffer, so that
// nothing beyond the row is touched and every element goes through the same instructions.
#pragma once
#include "common/cpu/convert.h"

namespace df::cpu::DF_ISA {
struct Whole {};  // a whole vector, where an int stands for the elements of the last one

template <class T, class E>
inline Vec<T> load_part(const E* p, Whole) {
  return load_compute(p);
}
template <class T, class E>
inline Vec<T> load_part(const E* p, int n) {
  E buffer[kLanes<T>] = {};
  __builtin_memcpy(buffer, p, n * sizeof(E));
  return load_compute(buffer);
}
template <class T, class E>
inline void store_part(Vec<T> x, E* p, Whole) {
  store_compute(x, p);
}
template <class T, class E>
inline void store_part(Vec<T> x, E* p, int n) {
  E buffer[kLanes<T>];
  store_compute(x, buffer);
  __builtin_memcpy(p, buffer, n * sizeof(E));
}

// fn(c, part) for the vectors that start at columns c of [0, n).
template <class T, class Fn>
inline void over_row(int64_t n, Fn fn) {
  int64_t c = 0;
  for (; c + kLanes<T> <= n; c += kLanes<T>) fn(c, Whole{});
  if (c < n) fn(c, int(n - c));
}
}  // namespace df::cpu::DF_ISA
