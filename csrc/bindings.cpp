// The whole C++ surface of thinkmid.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "decode.hpp"
#include "isa.hpp"
#include "ops.hpp"
#include "pack.hpp"
#include "rows.hpp"

namespace py = pybind11;
using thinkmid::Mode;

namespace {

// Tensors come as addresses, 0 for None: see launch.address. Their dtype, layout and lifetime are the caller's promise.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

thinkmid::Policy policy_of(const uintptr_t* p, const std::vector<double>& scalars) {
  const double* s = scalars.data();
  return {at<float>(p[0]), at<float>(p[1]), at<float>(p[2]), at<float>(p[3]), at<float>(p[4]), s[0], s[1],
          s[2],            s[3],            s[4],            s[5],            s[6]};
}

void rows(const std::string& mode, int64_t num_rows, int64_t vocab, int64_t z_stride, int64_t out_stride, double softcap,
          const std::vector<uintptr_t>& p, const std::vector<double>& scalars) {
  thinkmid::Rows k{mode == "stats" ? Mode::kStats : mode == "grad" ? Mode::kGrad : Mode::kPolicy,
                   num_rows, vocab, z_stride, out_stride, float(softcap),
                   at<float>(p[0]), at<float>(p[1]), at<int64_t>(p[2]), at<float>(p[3]), at<float>(p[4]),
                   at<float>(p[5]), at<float>(p[6]), at<float>(p[7]), at<float>(p[8]), at<float>(p[9]), {}};
  if (k.mode == Mode::kPolicy) k.policy = policy_of(p.data() + 10, scalars);
  thinkmid::run_rows(k);
}

void policy_rows(int64_t num_rows, const std::vector<uintptr_t>& p, const std::vector<double>& scalars) {
  thinkmid::run_policy(policy_of(p.data() + 1, scalars), num_rows, at<float>(p[0]), at<float>(p[6]), at<float>(p[7]),
                       at<float>(p[8]), at<float>(p[9]));
}

void rms_norm(int64_t num_rows, int64_t width, double eps, uintptr_t x, uintptr_t residual, uintptr_t weight,
              uintptr_t h, uintptr_t y, uintptr_t rstd) {
  thinkmid::rms_forward({num_rows, width, at<float>(x), at<float>(residual), at<float>(weight), eps, at<float>(h),
                         at<float>(y), at<float>(rstd)});
}

void rms_norm_backward(int64_t num_rows, int64_t width, uintptr_t h, uintptr_t weight, uintptr_t rstd, uintptr_t dy,
                       uintptr_t dh, uintptr_t dx, uintptr_t dweight) {
  thinkmid::rms_backward({num_rows, width, at<float>(h), at<float>(weight), at<float>(rstd), at<float>(dy),
                          at<float>(dh), at<float>(dx), at<float>(dweight)});
}

void rope(int64_t num_rows, int64_t heads, int64_t width, int64_t row_stride, int64_t head_stride, double sign,
          uintptr_t x, uintptr_t cos, uintptr_t sin, uintptr_t out) {
  thinkmid::rope({num_rows, heads, width, row_stride, head_stride, at<float>(x), at<float>(cos), at<float>(sin),
                  float(sign), at<float>(out)});
}

void swiglu(int64_t size, uintptr_t gate, uintptr_t up, uintptr_t out) {
  thinkmid::swiglu({at<float>(gate), at<float>(up), nullptr, at<float>(out), nullptr, nullptr}, size);
}

void swiglu_backward(int64_t size, uintptr_t gate, uintptr_t up, uintptr_t dout, uintptr_t dgate, uintptr_t dup) {
  thinkmid::swiglu({at<float>(gate), at<float>(up), at<float>(dout), nullptr, at<float>(dgate), at<float>(dup)}, size);
}

void decode_attention(const std::vector<int64_t>& n, int64_t window, const std::vector<uintptr_t>& p) {
  thinkmid::decode_attention({n[0], n[1], n[2], n[3], n[4], n[5], window, at<float>(p[0]), at<float>(p[1]),
                              at<float>(p[2]), at<float>(p[3]), at<float>(p[4]), at<float>(p[5]), at<float>(p[6]),
                              at<int64_t>(p[7]), at<int64_t>(p[8]), at<int64_t>(p[9]), at<float>(p[10])});
}

}  // namespace

PYBIND11_MODULE(_csrc, m) {
  m.doc() = "thinkmid's C++. Each function has a Python twin, beside its caller in thinkmid/.";
  m.def("best_fit", &thinkmid::best_fit, py::arg("lengths"), py::arg("capacity"),
        py::call_guard<py::gil_scoped_release>());
  m.def("balance", &thinkmid::balance, py::arg("costs"), py::arg("lengths"), py::arg("capacity"), py::arg("num_bins"),
        py::call_guard<py::gil_scoped_release>());
  m.def("rows", &rows, py::call_guard<py::gil_scoped_release>());
  m.def("policy_rows", &policy_rows, py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm", &rms_norm, py::call_guard<py::gil_scoped_release>());
  m.def("rms_norm_backward", &rms_norm_backward, py::call_guard<py::gil_scoped_release>());
  m.def("rope", &rope, py::call_guard<py::gil_scoped_release>());
  m.def("swiglu", &swiglu, py::call_guard<py::gil_scoped_release>());
  m.def("swiglu_backward", &swiglu_backward, py::call_guard<py::gil_scoped_release>());
  m.def("decode_attention", &decode_attention, py::call_guard<py::gil_scoped_release>());
  m.def("isa", &thinkmid::isa_name, "The instruction set that runs: base, avx2 or avx512.");
  m.def("isas", &thinkmid::isas, "All that this CPU can run.");
  m.def("use_isa", &thinkmid::use_isa, py::arg("name"), "For tests: run this one from now on.");
}
