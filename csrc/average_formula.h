// SPDX-License-Identifier: Apache-2.0
// The formulas of the averages of weights, one element at a time, for host and device alike, and nothing else: no loop,
// no launch, no tensor. Plain C++: must not include Paddle or CUDA. Compile with contraction off (g++
// -ffp-contract=off, nvcc -fmad=false), so that every device gives the same bits.
#pragma once

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

}  // namespace paddle_asgd
