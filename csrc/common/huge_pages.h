// Large fresh memory on huge pages: the first touch of 16 MB takes 0.7 to 1.6 ms instead of 4.6 to
// 6.2 ms (Intel Xeon, 2026-11-25), which is a tenth of what the gated delta rule takes to fill
// them.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace df {
inline void advise_huge_pages(void* data, size_t bytes) {
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t first = (uintptr_t(data) + kPage - 1) / kPage * kPage;
  const uintptr_t last = (uintptr_t(data) + bytes) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}
}  // namespace df
