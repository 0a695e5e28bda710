// SPDX-License-Identifier: Apache-2.0
// The launches of SAG's kernels: its arguments in cuda_launch.h, sorted by storage types. Must not hold a kernel.
#pragma once

#include "asgd_kernel.h"
#include "cuda_launch.h"

namespace paddle_asgd {

// The threads of a block, in every kernel that works on elements.
constexpr int kThreads = 256;

template <int kBytes>
using AsgdLaunch = Launch<TensorArgs, StepArgs, kBytes>;

// The pairs of parameter and gradient. A kernel is compiled for each, so a launch holds tensors of one pair.
constexpr DType kTypes[][2] = {{DType::kFloat32, DType::kFloat32},   {DType::kFloat64, DType::kFloat64},
                               {DType::kFloat16, DType::kFloat16},   {DType::kFloat16, DType::kFloat32},
                               {DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32}};

inline bool is_of(const TensorArgs& t, const DType (&types)[2]) {
  return t.param_dtype == types[0] && t.grad_dtype == types[1];
}

// `enqueue` is called with launches of either length, at least once and perhaps with one of no tensor.
template <typename Enqueue>
cudaError_t for_each_launch(const StepArgs& step, const DType (&types)[2], const Enqueue& enqueue) {
  return for_each_launch(step.tensors, step, [&](const TensorArgs& t) { return is_of(t, types); }, enqueue);
}

}  // namespace paddle_asgd
