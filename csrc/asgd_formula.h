// SPDX-License-Identifier: Apache-2.0
// The update of one element, for host and device. Must not include Paddle or CUDA, nor be compiled with contraction: a
// fused product is rounded once less, and each compiler fuses others. The letters are those of Schmidt, Le Roux and
// Bach, "Minimizing Finite Sums with the Stochastic Average Gradient" (2017): x is the parameter, g the gradient of
// this step's batch i of n, y_i the last gradient seen of it, d the sum of all weight_i * y_i, m the steps taken.
#pragma once

#include "half.h"

namespace paddle_asgd {

// The order matters: with one batch, where d equals y_i, the result must be g exactly, and what rounding adds to a sum
// of many numbers of one sign when g enters, it takes back when g leaves.
template <typename T>
PADDLE_ASGD_HOST_DEVICE T replace_gradient(T d, T y_i, T g, T weight) {
  return (d - weight * y_i) + weight * g;
}

template <typename T>
struct Coefficients {  // the same for every element of a step: computed once, in double
  T weight;            // of batch i; all are 1 unless batches are of unequal size
  T step;              // learning_rate / (what the batches seen so far weigh together)
  T shrink;            // learning_rate * weight_decay
  T change;            // learning_rate * theta, where there is a theta
};

template <typename T>
PADDLE_ASGD_HOST_DEVICE Coefficients<T> coefficients(double learning_rate, double weight_decay, double theta,
                                                     double weight, double weight_seen) {
  return Coefficients<T>{static_cast<T>(weight), static_cast<T>(learning_rate / weight_seen),
                         static_cast<T>(learning_rate * weight_decay), static_cast<T>(learning_rate * theta)};
}

template <typename T>
PADDLE_ASGD_HOST_DEVICE T descend(T x, T d, Coefficients<T> c) {
  return x - (c.step * d + c.shrink * x);  // SAG, which takes d as replace_gradient() has left it
}

// With theta = 1 / (batches seen) this is SAG, and with theta = 1 SAGA (Defazio, Bach and Lacoste-Julien, NIPS 2014).
template <typename T>
PADDLE_ASGD_HOST_DEVICE T descend_theta(T x, T d_old, T y_i, T g, Coefficients<T> c) {
  return x - ((c.change * (c.weight * (g - y_i)) + c.step * d_old) + c.shrink * x);
}

// The gradient of the whole objective as far as the history knows it.
template <typename T>
PADDLE_ASGD_HOST_DEVICE double known_gradient(T x, T d, double weight_decay, double weight_seen) {
  return static_cast<double>(d) / weight_seen + weight_decay * static_cast<double>(x);
}

}  // namespace paddle_asgd
