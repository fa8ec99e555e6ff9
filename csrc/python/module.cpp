// deltafuse._C: introspection and test doors; no operator goes through here.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "common/isa.h"
#include "python/doors.h"

namespace py = pybind11;

static void* pointer(const py::buffer_info& info, bool f64) {
  if (info.itemsize != (f64 ? 8 : 4)) throw std::invalid_argument("buffers differ in element type");
  return info.ptr;
}

static void math(df::DoorFn fn, const py::buffer& x, const py::buffer& y) {
  const py::buffer_info in = x.request(), out = y.request(true);
  const bool f64 = in.itemsize == 8;
  df::door_math(fn, f64, in.ptr, pointer(out, f64), in.size);
}

static void round_trip(bool half, const py::buffer& x, const py::buffer& bits,
                       const py::buffer& y) {
  const py::buffer_info in = x.request(), stored = bits.request(true), out = y.request(true);
  df::door_round_trip(half, static_cast<float*>(in.ptr), static_cast<uint16_t*>(stored.ptr),
                      static_cast<float*>(out.ptr), in.size);
}

static void gemm(const py::buffer& a, const py::buffer& b, const py::buffer& c, bool transposed,
                 int shape, bool add) {
  const py::buffer_info ia = a.request(), ib = b.request(), ic = c.request(true);
  const bool f64 = ia.itemsize == 8;
  df::door_gemm({ia.ptr, pointer(ib, f64), pointer(ic, f64), ic.shape[0], ic.shape[1], ib.shape[0],
                 shape, f64, transposed, add});
}

PYBIND11_MODULE(_C, m) {
  m.def("cpu_isa", &df::isa_name);
  m.def("set_cpu_isa", &df::set_isa);
  py::enum_<df::DoorFn>(m, "DoorFn")
      .value("exp", df::DoorFn::exp)
      .value("log", df::DoorFn::log)
      .value("sigmoid", df::DoorFn::sigmoid)
      .value("silu", df::DoorFn::silu)
      .value("softplus", df::DoorFn::softplus);
  m.def("door_math", &math);
  m.def("door_round_trip", &round_trip);
  m.def("door_gemm", &gemm, py::arg("a"), py::arg("b"), py::arg("c"), py::arg("transposed") = false,
        py::arg("shape") = 0, py::arg("add") = false);
}
