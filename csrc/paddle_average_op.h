// SPDX-License-Identifier: Apache-2.0
// What the door of dygraph hands over for AveragedModel, and the functions behind it. Must not know how a Python
// function arrives.
#pragma once

#include "paddle_op.h"

namespace paddle_asgd {

// Two lists that run parallel; the second's tensors give their names to errors.
struct TensorPairs {
  Tensors first, second;
};

struct AverageUpdate {
  TensorPairs averaged;  // averages and the values that they follow
  double weight = 0;
  TensorPairs copied;  // copies and what they are copies of
};

struct AverageSwap {
  TensorPairs exchanged;
  TensorPairs assigned;  // targets and their sources
};

// Nothing is written before everything has been checked. Empty lists are no error.
void average_update(const AverageUpdate& received);
void average_swap(const AverageSwap& received);

}  // namespace paddle_asgd
