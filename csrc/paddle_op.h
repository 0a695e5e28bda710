// SPDX-License-Identifier: Apache-2.0
// What the operators of all optimizers share: lists of tensors, a parameter with its master weight, the device that a
// call runs on, and errors in the form that executors pass on. Must not know any one operator's arguments.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "paddle/common/enforce.h"
#include "paddle/utils/optional.h"
#include "paddle_tensor.h"

namespace paddle_asgd {

using Tensors = std::vector<const Tensor*>;

// What this library or the device cannot do. Becomes a RuntimeError.
struct DeviceError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A number as both doors deliver it.
struct Number {
  const Tensor* tensor = nullptr;  // null: `value` holds
  double value = 0;
};

// The number as a kernel takes it; a tensor must lie on the host or on `place`.
inline Scalar scalar(const char* what, const Number& number, const Place& place) {
  return scalar(what, number.tensor, number.value, place);
}

inline void check_length(const char* what, size_t received, size_t expected) {
  if (received == expected) return;
  refuse(std::string("number of ") + what, std::to_string(received), std::to_string(expected) + ", one a parameter");
}

// The device of a step. An empty parameter says nothing about it: its counter, which never is empty, does.
inline Place place_of(const Tensors& params, const char* what, const Tensors& counters) {
  const Tensor& first = *counters[0];
  if (!first.defined() || !first.initialized()) {
    Check(*params[0], 0, Place()).fail(what, "no memory", "a tensor of one int64");
  }
  return first.place();
}

// A parameter that has been checked, and where its elements and those of its master weight lie.
struct Weights {
  const DDim* dims;
  DataType dtype;
  int64_t numel;
  void* param;
  void* master;  // null: there is none

  // That of the state which is as precise as the arithmetic.
  DataType wide() const { return dtype == DataType::FLOAT64 ? DataType::FLOAT64 : DataType::FLOAT32; }
};

inline Weights check_weights(const Check& check, const Tensor& given, const std::optional<Tensors>& masters, size_t i) {
  const DenseTensor& param = check.dense("value", given);
  Weights w{&param.meta().dims, param.meta().dtype, extent_of(param).numel, nullptr, nullptr};
  const bool half = is_16_bit(w.dtype);
  if (!half && w.dtype != DataType::FLOAT32 && w.dtype != DataType::FLOAT64) {
    check.fail("dtype", show(w.dtype), "float16, bfloat16, float32 or float64");
  }
  w.param = check.memory("value", param);
  if (masters) {
    if (!half) check.fail("dtype", show(w.dtype), "float16 or bfloat16 beside a master weight");
    w.master = check.like("master weight", *(*masters)[i], *w.dims, DataType::FLOAT32);
  }
  return w;
}

// Runs on the device where `first` is: its kernel there returns CUDA's words about what went wrong, or null.
template <typename OnCpu, typename OnGpu>
void run_on_device(const Tensor& first, const OnCpu& on_cpu, [[maybe_unused]] const OnGpu& on_gpu) {
  const Place place = first.place();
  if (place.GetType() == phi::AllocationType::CPU) return on_cpu();
#ifdef PADDLE_WITH_CUDA
  if (place.GetType() == phi::AllocationType::GPU) {
    const char* error = on_gpu(place.GetDeviceId(), first.stream());
    if (error == nullptr) return;
    throw DeviceError(std::string("CUDA says: ") + error);
  }
#endif
  throw DeviceError("parameters on " + show(place) + ", but this build of paddle_asgd serves " +
#ifdef PADDLE_WITH_CUDA
                    "the CPU and NVIDIA GPUs only; move the parameters there");
#else
                    "the CPU only. Rebuild it where nvcc and a GPU build of Paddle are installed: "
                    "pip install --no-build-isolation --force-reinstall --no-deps .");
#endif
}

// After a forward and a backward pass the tensors' descriptions are in no cache, and a call on many small tensors waits
// for them more than for anything else. So those of a later parameter are fetched while this one is checked.
constexpr size_t kAhead = 8;

inline void fetch_description(const Tensor& t) {
  const char* description = reinterpret_cast<const char*>(t.impl().get());
  for (int line = 0; line < 5; ++line) __builtin_prefetch(description + 64 * line);
}

inline Tensors addresses(const std::vector<Tensor>& tensors) {
  Tensors result;
  for (const Tensor& t : tensors) result.push_back(&t);
  return result;
}

inline std::optional<Tensors> addresses(const paddle::optional<std::vector<Tensor>>& tensors) {
  return tensors ? std::optional<Tensors>(addresses(*tensors)) : std::nullopt;
}

// Makes the call of a static graph's operator. Executors keep the text of Paddle's own exceptions only.
template <typename Call>
void run_operator(const char* name, const Call& call) {
  try {
    call();
  } catch (const ArgumentError& error) {
    PADDLE_THROW(common::errors::InvalidArgument("%s: %s", name, error.what()));
  } catch (const DeviceError& error) {
    PADDLE_THROW(common::errors::Fatal("%s: %s", name, error.what()));
  }
}

}  // namespace paddle_asgd
