// For host code around a kernel: within its life, results too small for a normal number become 0 on
// this thread. Decays produce them in masses, and each costs an x86 core some 150 cycles. Subnormal
// inputs are still read as they are.
#pragma once

namespace df {
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(__builtin_ia32_stmxcsr()) {
    __builtin_ia32_ldmxcsr(before_ | kFlushToZero);
  }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 1u << 15;
  unsigned before_;
};
}  // namespace df
