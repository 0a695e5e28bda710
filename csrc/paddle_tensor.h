// SPDX-License-Identifier: Apache-2.0
// Reads and checks what Paddle hands over: the dimensions, dtype, place and memory of one tensor at a time. Must not
// compute, launch, or know what a step is (paddle_asgd_op.cc). What is returned holds for one call: never keep a
// pointer.
#pragma once

#include <algorithm>
#include <sstream>
#include <stdexcept>
#include <string>
#include <typeinfo>

#include "kernel_arguments.h"
#include "paddle/common/ddim.h"
#include "paddle/extension.h"
// Its error reporting asks for the headers of cuBLAS, cuDNN and more, which a toolkit need not have. Nothing that is
// read here depends on them.
#pragma push_macro("PADDLE_WITH_CUDA")
#undef PADDLE_WITH_CUDA
#include "paddle/phi/core/dense_tensor.h"
#pragma pop_macro("PADDLE_WITH_CUDA")

namespace paddle_asgd {

using common::DDim;
using paddle::DataType;
using paddle::Place;
using paddle::Tensor;
using phi::DenseTensor;

// What was received does not fit. Becomes a ValueError at both doors, which put the name of their operator before it.
struct ArgumentError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

[[noreturn]] inline void refuse(const std::string& what, const std::string& received, const std::string& expected) {
  throw ArgumentError(what + ": received " + received + ", expected " + expected);
}

inline std::string show(const DDim& shape) {
  std::ostringstream text;
  text << "[";
  for (int i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << "]";
  return text.str();
}

template <typename Printable>
std::string show(const Printable& value) {
  std::ostringstream text;
  text << value;
  return text.str();
}

// ---- Reading ------------------------------------------------------------------------------------------------------

// A step of many small tensors costs what it takes to read their descriptions, five for each parameter. So these come
// inline from DenseTensor's fields: each of Tensor's own accessors is a call, or several, into another library. The
// price is that the library serves only the Paddle that it was built for, which native.py checks.

// Null: not defined, or not dense.
inline const DenseTensor* dense_tensor(const Tensor& t) {
  const phi::TensorBase* impl = t.impl().get();
  // A DenseTensor and nothing derived from it, as nearly always: classof() is a call into another library.
  if (impl != nullptr && typeid(*impl) == typeid(DenseTensor)) return static_cast<const DenseTensor*>(impl);
  return impl != nullptr && DenseTensor::classof(impl) ? static_cast<const DenseTensor*>(impl) : nullptr;
}

// Place's own comparison computes two hashes. Kinds of custom devices are not told apart: none is served
// (run_on_device).
inline bool same(const Place& a, const Place& b) {
  return a.GetType() == b.GetType() && a.GetDeviceId() == b.GetDeviceId();
}

// DDim's own comparison goes by a visitor.
inline bool same(const DDim& a, const DDim& b) {
  return a.size() == b.size() && std::equal(a.Get(), a.Get() + a.size(), b.Get());
}

struct Extent {
  int64_t numel;
  bool contiguous;
};

inline Extent extent_of(const DenseTensor& t) {
  const phi::DenseTensorMeta& meta = t.meta();
  Extent extent{1, true};
  for (int i = meta.dims.size() - 1; i >= 0; --i) {
    if (meta.dims[i] != 1 && meta.strides[i] != extent.numel) extent.contiguous = false;
    extent.numel *= meta.dims[i];
  }
  return extent;
}

struct Memory {
  void* begin = nullptr;         // null: none, or none that may be asked for, because it ends before the shape
  size_t size = 0;               // in bytes
  const Place* place = nullptr;  // null: no memory
};

// DenseTensor::data() computes strides and sizes anew at every call. Before 3.2, Paddle offers extensions nothing else.
template <typename Dense>
auto memory_of(const Dense& t, int) -> decltype(t.Holder(), Memory{}) {
  const phi::Allocation* holder = t.Holder().get();
  if (holder == nullptr) return Memory{};
  char* begin = static_cast<char*>(holder->ptr());
  if (begin == nullptr) return Memory{};
  return Memory{begin + t.meta().offset, holder->size() - t.meta().offset, &holder->place()};
}

template <typename Dense>
Memory memory_of(const Dense& t, long) {
  if (!t.initialized()) return Memory{};
  const size_t size = t.capacity() - t.meta().offset;
  // data() would raise an error of Paddle's own, of another type.
  const bool whole = static_cast<size_t>(extent_of(t).numel) * phi::SizeOf(t.meta().dtype) <= size;
  return Memory{whole ? const_cast<void*>(t.data()) : nullptr, size, &t.place()};
}

// ---- Checking -----------------------------------------------------------------------------------------------------

// The checks of one parameter's tensors. They run at every step, so they allocate nothing unless they fail.
class Check {
 public:
  Check(const Tensor& param, size_t position, const Place& place) : param_(param), position_(position), place_(place) {}

  [[noreturn]] void fail(const std::string& what, const std::string& received, const std::string& expected) const {
    // Executors pass tensors without a name, so the position stands in.
    const std::string& name = param_.name();
    refuse(what + " of parameter " + (name.empty() ? "#" + std::to_string(position_) : "'" + name + "'"), received,
           expected);
  }

  const DenseTensor& dense(const char* what, const Tensor& t) const {
    const DenseTensor* dense = dense_tensor(t);
    if (dense == nullptr) fail(what, "no dense tensor", "a dense tensor");
    return *dense;
  }

  // The memory of a tensor that is in one piece, on the place of all others; null for an empty tensor.
  void* memory(const char* what, const DenseTensor& t) const {
    const Extent extent = extent_of(t);
    // An empty tensor may have no memory, and then no device either.
    if (extent.numel == 0) return nullptr;
    // A strided tensor would be copied, and what is written to the copy would be lost without a word.
    if (!extent.contiguous) {
      fail(std::string("layout of ") + what, "a strided view", "a contiguous tensor; call .contiguous() on it");
    }
    const Memory memory = memory_of(t, 0);
    if (memory.place == nullptr) fail(what, "a tensor without memory", "an initialised tensor");
    const size_t needed = static_cast<size_t>(extent.numel) * phi::SizeOf(t.meta().dtype);
    if (memory.size < needed) {
      fail(std::string("memory of ") + what, std::to_string(memory.size) + " bytes",
           std::to_string(needed) + ", as its shape " + show(t.meta().dims) + " says");
    }
    if (!same(*memory.place, place_)) fail(std::string("place of ") + what, show(*memory.place), show(place_));
    return memory.begin;
  }

  // The same for a dense tensor that must have these dimensions and this dtype.
  void* like(const char* what, const Tensor& t, const DDim& dims, DataType dtype) const {
    return like(what, dense(what, t), dims, dtype);
  }

  void* like(const char* what, const DenseTensor& received, const DDim& dims, DataType dtype) const {
    const phi::DenseTensorMeta& meta = received.meta();
    if (!same(meta.dims, dims)) fail(std::string("shape of ") + what, show(meta.dims), show(dims));
    if (meta.dtype != dtype) fail(std::string("dtype of ") + what, show(meta.dtype), show(dtype));
    return memory(what, received);
  }

 private:
  const Tensor& param_;
  size_t position_;
  const Place& place_;
};

// One number or flag for all parameters.
inline Memory one_element(const char* what, const Tensor& t, const std::string& expected) {
  const DenseTensor* dense = dense_tensor(t);
  const Memory memory = dense == nullptr ? Memory{} : memory_of(*dense, 0);
  if (memory.begin == nullptr) refuse(what, "a tensor without memory", expected);
  if (extent_of(*dense).numel != 1) refuse(what, "a tensor of shape " + show(t.dims()), expected);
  return memory;
}

// A number in a tensor: on the host it is read here, on a device by the kernel.
inline Scalar scalar(const char* what, const Tensor* t, double value, const Place& place) {
  if (t == nullptr) return Scalar{nullptr, DType::kFloat64, value};
  const std::string expected = "one float32 or float64 number";
  const Memory memory = one_element(what, *t, expected);
  if (t->dtype() != DataType::FLOAT32 && t->dtype() != DataType::FLOAT64) {
    refuse(what, "a tensor of " + show(t->dtype()), expected);
  }
  Scalar number{memory.begin, t->dtype() == DataType::FLOAT64 ? DType::kFloat64 : DType::kFloat32, 0};
  if (memory.place->GetType() == phi::AllocationType::CPU) return Scalar{nullptr, DType::kFloat64, load(number)};
  if (!same(*memory.place, place)) {
    refuse(what, "a tensor on " + show(*memory.place), show(place) + ", where the parameters are");
  }
  return number;
}

// `count` numbers of float64 where the parameters are, or null.
inline double* doubles(const char* what, const Tensor* t, int64_t count, const Place& place) {
  if (t == nullptr) return nullptr;
  // Made for an error only: a step with cold caches would wait longer for Place's printing than for its own work.
  const auto expected = [&]() { return "float64 [" + std::to_string(count) + "] on " + show(place); };
  const DenseTensor* dense = dense_tensor(*t);
  const Memory memory = dense == nullptr ? Memory{} : memory_of(*dense, 0);
  if (memory.begin == nullptr) refuse(what, "a tensor without memory", expected());
  const DDim& dims = dense->meta().dims;
  const bool fits = dims.size() == 1 && dims[0] == count && extent_of(*dense).contiguous;
  if (!fits || dense->meta().dtype != DataType::FLOAT64 || !same(*memory.place, place)) {
    refuse(what, show(t->dtype()) + " " + show(t->dims()) + " on " + show(*memory.place), expected());
  }
  return static_cast<double*>(memory.begin);
}

inline const bool* flag(const char* what, const Tensor* t, const Place& place) {
  if (t == nullptr) return nullptr;
  const std::string expected = "one bool on " + show(place);
  const Memory memory = one_element(what, *t, expected);
  if (t->dtype() != DataType::BOOL || !same(*memory.place, place)) {
    refuse(what, show(t->dtype()) + " " + show(t->dims()) + " on " + show(*memory.place), expected);
  }
  return static_cast<const bool*>(memory.begin);
}

inline bool is_16_bit(DataType dtype) { return dtype == DataType::FLOAT16 || dtype == DataType::BFLOAT16; }

inline DType kernel_dtype(DataType dtype) {
  switch (dtype) {
    case DataType::FLOAT64:
      return DType::kFloat64;
    case DataType::FLOAT16:
      return DType::kFloat16;
    case DataType::BFLOAT16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

}  // namespace paddle_asgd
