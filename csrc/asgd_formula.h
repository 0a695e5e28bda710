// SPDX-License-Identifier: Apache-2.0
// The stochastic average gradient update of one element, for host and device alike, and nothing else: no loop, no
// launch, no tensor. Plain C++: must not include Paddle or CUDA. Compile with contraction off (g++ -ffp-contract=off,
// nvcc -fmad=false), so that every device gives the same bits.
//
// The letters are those of Schmidt, Le Roux and Bach, "Minimizing Finite Sums with the Stochastic Average Gradient"
// (Mathematical Programming 162, 2017), Algorithm 1:
//   x  the parameter          g    the gradient of this step's batch
//   n  the number of batches  y_i  the last gradient seen of batch i
//   d  the sum of all y_i     m    the steps taken before this one (asgd_slots.h)
// Where batches are of unequal size, w_i is the weight of batch i, and d the sum of all w_i * y_i.
#pragma once

#include "half.h"

namespace paddle_asgd {

// d <- d - w_i * y_i + w_i * g. In this order: with one batch, where d equals y_i, the result is g exactly; and
// what rounding adds to a sum of many numbers of one sign when g enters, it takes back when g leaves.
template <typename T>
PADDLE_ASGD_HOST_DEVICE T replace_gradient(T d, T y_i, T g, T weight) {
  return (d - weight * y_i) + weight * g;
}

// What one step multiplies with, the same for every element: computed once, in double.
template <typename T>
struct Coefficients {
  T weight;  // w_i
  T step;    // learning_rate / (what the batches seen so far weigh together)
  T shrink;  // learning_rate * weight_decay
  T change;  // learning_rate * theta, where there is a theta
};

template <typename T>
PADDLE_ASGD_HOST_DEVICE Coefficients<T> coefficients(double learning_rate, double weight_decay, double theta,
                                                     double weight, double weight_seen) {
  return Coefficients<T>{static_cast<T>(weight), static_cast<T>(learning_rate / weight_seen),
                         static_cast<T>(learning_rate * weight_decay), static_cast<T>(learning_rate * theta)};
}

// x <- x - learning_rate * (d / m + weight_decay * x), with the present d. This is SAG.
template <typename T>
PADDLE_ASGD_HOST_DEVICE T descend(T x, T d, Coefficients<T> c) {
  return x - (c.step * d + c.shrink * x);
}

// x <- x - learning_rate * (theta * w_i * (g - y_i) + d_old / m + weight_decay * x), with d as it was before this step.
// SAG is theta = 1 / m. With theta = 1 it is SAGA: Defazio, Bach and Lacoste-Julien, "SAGA: A Fast Incremental Gradient
// Method With Support for Non-Strongly Convex Composite Objectives" (NIPS 2014).
template <typename T>
PADDLE_ASGD_HOST_DEVICE T descend_theta(T x, T d_old, T y_i, T g, Coefficients<T> c) {
  return x - ((c.change * (c.weight * (g - y_i)) + c.step * d_old) + c.shrink * x);
}

// d / m + weight_decay * x: the gradient of the whole objective as far as the history knows it. The paper stops where
// its norm is small.
template <typename T>
PADDLE_ASGD_HOST_DEVICE double known_gradient(T x, T d, double weight_decay, double weight_seen) {
  return static_cast<double>(d) / weight_seen + weight_decay * static_cast<double>(x);
}

}  // namespace paddle_asgd
