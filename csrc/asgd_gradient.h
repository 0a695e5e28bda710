// SPDX-License-Identifier: Apache-2.0
// Finds the gradient of one of a step's tensors (gradient_rows.h). Must not read an element.
#pragma once

#include "asgd_kernel.h"
#include "gradient_rows.h"

namespace paddle_asgd {

// `t` must be one of the step's own tensors: its position among them finds the rows.
template <typename G>
Gradient<G> gradient_of(const TensorArgs& t, const StepArgs& step) {
  return gradient_at<G>(t.grad, step.gradient_rows, &t - step.tensors);
}

}  // namespace paddle_asgd
