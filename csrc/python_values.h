// Values between Python and the core. Arrays come and go as NumPy arrays (bfloat16 as uint16); what is
// wrong with them becomes a ValueError, never a crash.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace river {

namespace nb = nanobind;

using Matrix16 = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Matrix8 = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatVector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;  // of any dims
using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = std::tuple<Matrix8, Matrix16, Matrix16>;

template <class T>
nb::object numpy_array(std::vector<T>&& values, std::vector<size_t> shape,
                       std::vector<int64_t> strides = {}) {
  auto* owner = new std::vector<T>(std::move(values));
  nb::capsule capsule(owner, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(owner->data(), shape.size(), shape.data(), capsule,
                                            strides.empty() ? nullptr : strides.data()));
}

// As int64, which PyTorch takes without a conversion.
inline nb::object whole_numbers(const std::vector<int>& values) {
  return numpy_array(std::vector<int64_t>(values.begin(), values.end()), {values.size()});
}

inline std::vector<float> to_vector(const FloatVector& values) {
  return {values.data(), values.data() + values.size()};
}

inline int whole_number(const nb::dict& values, const char* name) {
  const nb::object given = values[name];  // a KeyError where there is none
  int value;
  if (!nb::try_cast<int>(given, value, false))
    throw std::invalid_argument(std::string(name) + " has to be a whole number");
  return value;
}

inline int checked_threads(int threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads have to be 1 to 1024");
  return threads;
}

}  // namespace river
