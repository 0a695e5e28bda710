// SPDX-License-Identifier: Apache-2.0
// What both kernels derive from their arguments: whether a step is taken, its visit and coefficients, and a tensor in
// types. Plain C++: must not include Paddle or CUDA, and must not touch an element.
#pragma once

#include "asgd_formula.h"
#include "asgd_kernel.h"
#include "asgd_refresh.h"
#include "asgd_slots.h"

namespace paddle_asgd {

// Called where the numbers lie: on a GPU the host does not know what keeps a step from being taken.
PADDLE_ASGD_HOST_DEVICE bool takes_step(const StepArgs& step) {
  if (step.found_inf != nullptr && *step.found_inf) return false;
  return !step.batch_index.given || in_range(load(step.batch_index), step.batch_num);
}

// Called before advance(), which changes what the clock says.
PADDLE_ASGD_HOST_DEVICE Visit visit_of(const TensorArgs& t, const StepArgs& step) {
  return step.batch_index.given ? indexed_visit(t.m, load(step.batch_index), step.batch_num)
                                : cyclic_visit(*t.m, step.batch_num);
}

PADDLE_ASGD_HOST_DEVICE double divisor(const Visit& visit, const TensorArgs& t, const StepArgs& step) {
  return weight_seen(visit, t.m, step.batch_index.given, step.batch_num, step.batch_weights);
}

// `seen` is the divisor, which is handed over because on the CPU a step computes it once for many tensors.
template <typename T>
PADDLE_ASGD_HOST_DEVICE Coefficients<T> coefficients_of(const StepArgs& step, const Visit& visit, double seen) {
  return coefficients<T>(load(step.learning_rate), load(step.weight_decay), load(step.theta),
                         step.batch_weights == nullptr ? 1.0 : step.batch_weights[visit.slot], seen);
}

// One parameter with its gradient and state, in the types of parameter, gradient and arithmetic. No pointer is declared
// __restrict__: `y_i` lies within `y`.
template <typename P, typename G, typename T>
struct Typed {
  P* param;
  const G* grad;
  T* d;
  G* y;    // null, like y_i, where the history is narrow (asgd_history.h)
  G* y_i;  // the slot of this step's batch
  T* master;
  int64_t numel;
};

template <typename P, typename G, typename T>
PADDLE_ASGD_HOST_DEVICE Typed<P, G, T> typed(const TensorArgs& t, int64_t slot) {
  G* y = t.history == History::kExact ? static_cast<G*>(t.y) : nullptr;
  return Typed<P, G, T>{static_cast<P*>(t.param),
                        static_cast<const G*>(t.grad),
                        static_cast<T*>(t.d),
                        y,
                        y == nullptr ? nullptr : y + slot * t.numel,
                        static_cast<T*>(t.master),
                        t.numel};
}

}  // namespace paddle_asgd
