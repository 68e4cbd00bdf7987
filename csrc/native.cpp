// The torch-free module: processor report, bandwidth probe, Philox and the noise stream for NumPy.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "cpu/bandwidth.h"
#include "cpu/isa.h"
#include "cpu/noise.h"

namespace py = pybind11;
namespace rf = realuid_fast;

namespace {

template <class Real>
py::array_t<Real> draw(rf::NoiseKey key, uint64_t start, std::vector<py::ssize_t> shape) {
  py::array_t<Real> out(std::move(shape));
  Real* to = out.mutable_data();
  const int64_t count = out.size();
  {
    py::gil_scoped_release release;
    rf::fill_elements(key, start, count, to);
  }
  return out;
}

py::array normals(uint64_t seed, uint64_t offset, uint64_t start, std::vector<py::ssize_t> shape, const std::string& dtype) {
  for (const auto size : shape)
    if (size < 0) throw py::value_error("shape must have no negative size");
  if (dtype == "float32") return draw<float>({seed, offset}, start, std::move(shape));
  if (dtype == "float64") return draw<double>({seed, offset}, start, std::move(shape));
  throw py::value_error("dtype must be float32 or float64, got " + dtype);
}

class NoiseStream {
 public:
  NoiseStream(uint64_t seed, uint64_t offset) : key_{seed, offset} {}

  py::array normal(std::vector<py::ssize_t> shape, const std::string& dtype) {
    py::array out = normals(key_.seed, key_.offset, 0, std::move(shape), dtype);
    ++key_.offset;
    return out;
  }

  uint64_t seed() const { return key_.seed; }
  uint64_t offset() const { return key_.offset; }

 private:
  rf::NoiseKey key_;
};

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  rf::philox(key[0], key[1], counter.data());
  return counter;
}

py::dict cpu() {
  py::dict levels;
  for (rf::Isa isa : {rf::Isa::baseline, rf::Isa::avx2, rf::Isa::avx512}) levels[rf::isa_name(isa)] = rf::supports(isa);
  return levels;
}

py::dict bandwidth(size_t megabytes, int repeats, int threads) {
  if (megabytes < 1 || repeats < 1 || threads < 1) throw py::value_error("megabytes, repeats and threads must be positive");
  rf::Bandwidth result;
  {
    py::gil_scoped_release release;
    result = rf::measure_bandwidth(megabytes << 20, repeats, threads);
  }
  py::dict out;
  out["copy"] = result.copy;
  out["fill"] = result.fill;
  return out;
}

// By default glibc returns large buffers to the system when they are freed, and a training loop that allocates the same
// tensors every step has all their pages zeroed and mapped again every step.
bool keep_freed_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) == 1 && mallopt(M_TRIM_THRESHOLD, -1) == 1;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Processor report, memory bandwidth and the noise stream for NumPy; needs no torch.";
  m.def("isa", [] { return std::string(rf::isa_name(rf::active_isa())); },
        "Instruction set the kernels run on: 'avx512', 'avx2' or 'baseline'. RuntimeError where REALUID_FAST_CPU_ISA asks "
        "for one that this processor lacks.");
  m.def("cpu", &cpu, "Which instruction sets this processor can run, as {name: bool}.");
  m.def("bandwidth", &bandwidth, py::arg("megabytes") = 256, py::arg("repeats") = 5, py::arg("threads") = 1,
        "Measured memory bandwidth in GB/s (10^9 bytes): {'copy': reads plus writes, 'fill': writes}, best of `repeats`.");
  m.def("keep_freed_memory", &keep_freed_memory,
        "Tell the C library to keep freed memory for the next allocation, for the rest of the process; False where it is not "
        "glibc and nothing was done.");
  m.def("philox", &philox, py::arg("counter"), py::arg("key"), "Philox4x32-10: four counter and two key words to four words.");
  m.def("normals", &normals, py::arg("seed"), py::arg("offset"), py::arg("start"), py::arg("shape"),
        py::arg("dtype") = "float32",
        "Standard normals of the elements start, start + 1, ... of the stream (seed, offset), as an array of `shape`.");
  py::class_<NoiseStream>(m, "NoiseStream",
                          "The stream of realuid_fast.NoiseStream for NumPy: the n-th call of normal() draws what the n-th key "
                          "of the same seed does.")
      .def(py::init<uint64_t, uint64_t>(), py::arg("seed"), py::arg("offset") = 0)
      .def("normal", &NoiseStream::normal, py::arg("shape"), py::arg("dtype") = "float32",
           "Standard normals of `shape`, float32 or float64; advances the offset by one.")
      .def_property_readonly("seed", &NoiseStream::seed)
      .def_property_readonly("offset", &NoiseStream::offset);
}
