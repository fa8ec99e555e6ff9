// The namespace's one library block; operators add their schemas as fragments.
#include <string>

#include "common/op.h"

static std::string build_info() {
  return DF_BUILD_INFO;
}

DF_LIBRARY(m) {
  m.def("build_info() -> str");
}
DF_IMPL(CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
