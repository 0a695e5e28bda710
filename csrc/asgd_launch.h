// SPDX-License-Identifier: Apache-2.0
// The launches of SAG's kernels: its arguments in cuda_launch.h. Must not hold a kernel.
#pragma once

#include "asgd_kernel.h"
#include "cuda_types.h"

namespace paddle_asgd {

template <int kBytes>
using AsgdLaunch = Launch<TensorArgs, StepArgs, kBytes>;

}  // namespace paddle_asgd
