#include "common/isa.h"

#include <string_view>

namespace df {
static const char* const kNames[] = {"scalar", "avx2", "avx512"};

static Isa best() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::avx512;
  return __builtin_cpu_supports("x86-64-v3") ? Isa::avx2 : Isa::scalar;
}

static Isa current = best();

Isa isa() {
  return current;
}

const char* isa_name() {
  return kNames[int(current)];
}

bool set_isa(const char* name) {
  for (int i = 0; i <= int(best()); ++i)
    if (std::string_view(name) == kNames[i]) return current = Isa(i), true;
  return false;
}
}  // namespace df
