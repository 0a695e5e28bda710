// SPDX-License-Identifier: Apache-2.0
// What the kernels of any optimizer take: how a tensor is stored, and a number that the host may not know. Plain C++:
// must not include Paddle or CUDA, nor know any formula.
#pragma once

#include <cstdint>

#include "platform.h"

namespace paddle_asgd {

// One byte, because a launch on a GPU holds as many tensors as fit into its arguments.
enum class DType : int8_t { kFloat32, kFloat64, kFloat16, kBFloat16 };

// A number that is either known to the host or lies in the memory of the device that the kernel runs on.
struct Scalar {
  const void* data;  // null: `value` holds
  DType dtype;       // of `data`: float32 or float64
  double value;
};

// Called where `data` lies.
PADDLE_ASGD_HOST_DEVICE double load(const Scalar& scalar) {
  if (scalar.data == nullptr) return scalar.value;
  return scalar.dtype == DType::kFloat64 ? *static_cast<const double*>(scalar.data)
                                         : static_cast<double>(*static_cast<const float*>(scalar.data));
}

}  // namespace paddle_asgd
