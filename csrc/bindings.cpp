// The whole C++ surface of thinkmid.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "pack.hpp"

namespace py = pybind11;

PYBIND11_MODULE(_csrc, m) {
  m.doc() = "thinkmid's C++: packing. The Python twins live in thinkmid/data/pack.py.";
  m.def("best_fit", &thinkmid::best_fit, py::arg("lengths"), py::arg("capacity"),
        py::call_guard<py::gil_scoped_release>());
  m.def("balance", &thinkmid::balance, py::arg("costs"), py::arg("lengths"), py::arg("capacity"), py::arg("num_bins"),
        py::call_guard<py::gil_scoped_release>());
}
