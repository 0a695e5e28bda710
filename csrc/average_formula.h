// SPDX-License-Identifier: Apache-2.0
// The formulas of the averages of weights, one element at a time, for host and device alike, and nothing else: no loop,
// no launch, no tensor. Plain C++: must not include Paddle or CUDA. Compile with contraction off (g++
// -ffp-contract=off, nvcc -fmad=false), so that every device gives the same bits.
#pragma once

#include "average_power.h"
#include "half.h"

namespace paddle_asgd {

// a <- a + weight * (x - a): every average here is of this form, and `weight` is what tells one from another. In this
// form, unlike in (1 - weight) * a + weight * x, an average of equal values is that value, and the result leaves the
// interval between a and x by at most one unit in the last place.
//   a  the average          x  the weight that it follows
template <typename T>
PADDLE_ASGD_HOST_DEVICE T average(T a, T x, T weight) {
  // A weight of one copies: a + (x - a) is not x where x - a is rounded, nor where a is Inf or NaN.
  return weight == T(1) ? x : a + weight * (x - a);
}

// ---- Averaged SGD ---------------------------------------------------------------------------------------------------
//
// Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging" (SIAM J. Control and Optimization 30,
// 1992), with the schedule of Bottou's SGD code and the letters of torch.optim.ASGD:
//   x    the parameter            g      its gradient
//   ax   the average of x         steps  the steps that the parameter has taken before this one
//   eta  the rate of the step     mu     the weight with which x enters ax

// The rate falls as the steps grow: eta = learning_rate / (1 + lambd * learning_rate * steps)^alpha.
PADDLE_ASGD_HOST_DEVICE double averaged_sgd_eta(double learning_rate, double lambd, double alpha, int64_t steps) {
  return learning_rate / power(1 + lambd * learning_rate * static_cast<double>(steps), alpha);
}

// mu = 1 / max(1, steps - t0): ax is x until t0 + 1 steps were taken, and from then on the mean of all x that followed.
PADDLE_ASGD_HOST_DEVICE double averaged_sgd_mu(double t0, int64_t steps) {
  const double past = static_cast<double>(steps) - t0;
  return past > 1 ? 1 / past : 1;
}

// What one step multiplies with, the same for every element: computed in double and rounded once.
template <typename T>
struct AveragedSgdCoefficients {
  T shrink;  // 1 - lambd * eta
  T rate;    // -eta
  T decay;   // weight_decay
  T sign;    // 1, or -1 to climb
  T mu;
};

// x <- (1 - lambd * eta) * x - eta * (g + weight_decay * x), of -g to climb.
template <typename T>
PADDLE_ASGD_HOST_DEVICE T descend_averaged(T x, T g, const AveragedSgdCoefficients<T>& c) {
  return c.shrink * x + c.rate * (c.sign * g + c.decay * x);
}

}  // namespace paddle_asgd
