// SPDX-License-Identifier: Apache-2.0
// What the door of dygraph hands over for AveragedModel, and the functions behind it. Must not know how a Python
// function arrives.
#pragma once

#include <vector>

#include "average_kernel.h"
#include "paddle_op.h"

namespace paddle_asgd {

// Two lists that run parallel; the second's tensors give their names to errors.
struct TensorPairs {
  Tensors first, second;
};

struct AverageUpdate {
  TensorPairs averaged;  // averages and the values that they follow
  TensorPairs copied;    // copies and what they are copies of
};

// What does not change from update to update as long as no tensor does: where all of them lie.
struct PreparedAverages {
  std::vector<PairArgs> averaged, copied;
  const Tensor* first = nullptr;  // says on which device; null: there is nothing to do
};

struct AverageSwap {
  TensorPairs exchanged;
  TensorPairs assigned;  // targets and their sources
};

// Checks all tensors. Empty lists are no error.
PreparedAverages prepare(const AverageUpdate& received);

// Checks the weight, and says what the kernel takes.
AverageArgs complete(const PreparedAverages& prepared, double weight);

// Runs the kernel where `first` is.
void average_run(const Tensor* first, const AverageArgs& args);

// Nothing is written before everything has been checked.
void average_swap(const AverageSwap& received);

}  // namespace paddle_asgd
