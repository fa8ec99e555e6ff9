// Element types as plain data, and the switch from the run-time enum to the type.
#pragma once
#include <cstdint>

namespace df {
enum class DType { f32, f64, bf16, f16 };

// Storage only; arithmetic happens in float (double for double).
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
struct Type {
  using type = T;
};

// fn(Type<float>{}), ...: the argument names the element type, `typename decltype(tag)::type`.
template <class Fn>
void dispatch(DType dtype, Fn fn) {
  switch (dtype) {
    case DType::f32: return fn(Type<float>{});
    case DType::f64: return fn(Type<double>{});
    case DType::bf16: return fn(Type<bf16>{});
    case DType::f16: return fn(Type<f16>{});
  }
}

// What the arithmetic of an element type is done in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;
}  // namespace df
