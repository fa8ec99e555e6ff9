// The sequences of [B,T,...] as plain data for kernels that look them up on the device.
#pragma once
#include <cstdint>

namespace df {
struct Offsets {  // cu_seqlens [N + 1] of the one row of T tokens; null: each of N rows is a
                  // sequence
  const void* data;
  bool wide;  // int64, else int32
  int64_t N, T;
};
}  // namespace df
