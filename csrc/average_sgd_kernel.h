// SPDX-License-Identifier: Apache-2.0
// What the kernels of averaged SGD take, the two entry points, one a device, and the coefficients that both derive from
// their arguments. Must not include Paddle or CUDA. Whoever calls has checked every size, dtype and place before
// (paddle_average_sgd_op.cc); the kernels trust what they are given.
#pragma once

#include <cstdint>

#include "average_formula.h"
#include "gradient_rows.h"
#include "kernel_arguments.h"

namespace paddle_asgd {

// One parameter and its state. The arithmetic is done in double for a float64 parameter and in float for all others.
struct AveragedSgdTensor {
  void* param;       // [numel] of param_dtype
  const void* grad;  // [numel] of grad_dtype, or the values of the rows that AveragedSgdStep::gradient_rows names
  void* ax;          // [numel], float or double: the average; null: there is none yet
  void* master;      // [numel] float, or null: the weights that a 16-bit parameter is rounded from
  int64_t* steps;    // the clock, read and advanced by the kernel
  const double* t0;  // null: that of the step holds
  void* eta;  // the rate of this step, kept since the last one, of AveragedSgdStep::eta_dtype; null: none is kept
  int64_t numel;
  DType param_dtype;
  DType grad_dtype;  // param_dtype, or float32 for a 16-bit parameter
};

struct AveragedSgdStep {
  const AveragedSgdTensor* tensors;
  int64_t count;
  Scalar learning_rate;
  Scalar weight_decay;
  Scalar lambd;
  Scalar alpha;
  Scalar t0;
  Scalar sign;                        // 1, or -1 to climb
  const bool* found_inf;              // device memory, or null. True: the step changes nothing
  const GradientRows* gradient_rows;  // [count] in host memory, or null: all gradients are dense. On the CPU only
  DType eta_dtype;                    // float32 or float64; where no eta is kept, float64
};

void average_sgd_cpu(const AveragedSgdStep& step);

// Enqueues the step on `stream` (a cudaStream_t) of `device`; returns null, or CUDA's words about what went wrong.
const char* average_sgd_cuda(const AveragedSgdStep& step, int device, void* stream);

// ---- What both kernels compute once for a tensor --------------------------------------------------------------------

// A number as it is kept where torch keeps eta and mu: rounded to float32 or not.
PADDLE_ASGD_HOST_DEVICE double kept_as(DType dtype, double value) {
  return dtype == DType::kFloat32 ? static_cast<double>(static_cast<float>(value)) : value;
}

// eta by the present learning rate, for the step after `steps` others.
PADDLE_ASGD_HOST_DEVICE double eta_after(const AveragedSgdStep& step, int64_t steps) {
  return averaged_sgd_eta(load(step.learning_rate), load(step.lambd), load(step.alpha), steps);
}

// eta of this step where one is kept: the last step's doing, and before the first step the learning rate.
PADDLE_ASGD_HOST_DEVICE double kept_eta(const AveragedSgdTensor& t, const AveragedSgdStep& step) {
  if (*t.steps == 0) return kept_as(step.eta_dtype, load(step.learning_rate));
  return load(Scalar{t.eta, step.eta_dtype, 0});
}

template <typename T>
PADDLE_ASGD_HOST_DEVICE AveragedSgdCoefficients<T> averaged_sgd_coefficients(const AveragedSgdTensor& t,
                                                                             const AveragedSgdStep& step, double eta) {
  const double mu = averaged_sgd_mu(t.t0 == nullptr ? load(step.t0) : *t.t0, *t.steps);
  return AveragedSgdCoefficients<T>{static_cast<T>(1 - load(step.lambd) * eta), static_cast<T>(-eta),
                                    static_cast<T>(load(step.weight_decay)), static_cast<T>(load(step.sign)),
                                    static_cast<T>(kept_as(step.eta_dtype, mu))};
}

// Counts the step, and keeps `next`, the eta of the one that follows.
PADDLE_ASGD_HOST_DEVICE void advance(const AveragedSgdTensor& t, DType eta_dtype, double next) {
  *t.steps += 1;
  if (t.eta == nullptr) return;
  if (eta_dtype == DType::kFloat32) {
    *static_cast<float*>(t.eta) = static_cast<float>(next);
  } else {
    *static_cast<double*>(t.eta) = next;
  }
}

// One parameter with its gradient and state.
template <typename P, typename G, typename T>
struct AveragedSgdTyped {
  P* param;
  const G* grad;
  T* ax;
  T* master;
  int64_t numel;
};

template <typename P, typename G, typename T>
PADDLE_ASGD_HOST_DEVICE AveragedSgdTyped<P, G, T> typed(const AveragedSgdTensor& t) {
  return AveragedSgdTyped<P, G, T>{static_cast<P*>(t.param), static_cast<const G*>(t.grad), static_cast<T*>(t.ax),
                                   static_cast<T*>(t.master), t.numel};
}

}  // namespace paddle_asgd
