// Python module fusedpo._store: the part of the C++ code that needs no torch. Only binds
// csrc/store.
#include <pybind11/pybind11.h>

#include <string_view>

#include "store/crc32c.h"

namespace py = pybind11;

PYBIND11_MODULE(_store, m) {
  m.doc() = "Storage core of fusedpo; needs neither torch nor numpy.";
  m.def(
      "crc32c",
      [](const py::bytes& data) {
        const std::string_view view = data;
        const py::gil_scoped_release release;
        return fusedpo::crc32c(view.data(), view.size());
      },
      py::arg("data"), "CRC-32C (Castagnoli) of a bytes object, unmasked.");
}
