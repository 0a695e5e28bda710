// SPDX-License-Identifier: Apache-2.0
// What the operators of all optimizers share: lists of tensors, the device that a call runs on, and errors in the form
// that executors pass on. Must not know any one operator's arguments.
#pragma once

#include <stdexcept>
#include <string>
#include <vector>

#include "paddle/common/enforce.h"
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
