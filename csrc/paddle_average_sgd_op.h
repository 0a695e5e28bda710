// SPDX-License-Identifier: Apache-2.0
// What both doors hand over for averaged SGD, and the function behind them. Must not know how an operator or a Python
// function arrives.
#pragma once

#include <optional>
#include <vector>

#include "average_sgd_kernel.h"
#include "paddle_op.h"
#include "paddle_rows.h"

namespace paddle_asgd {

// The arguments of one step as both doors deliver them, but for the gradients. All lists run parallel to `params`.
struct ReceivedAveragedSgd {
  Tensors params, steps;
  std::optional<Tensors> ax, t0s, etas, masters;
  Number learning_rate, weight_decay, lambd, alpha, t0, sign;
  const Tensor* found_inf = nullptr;
};

// What does not change from step to step as long as no tensor does: where parameters and state lie.
struct PreparedAveragedSgd {
  std::vector<AveragedSgdTensor> tensors;
  DType eta_dtype = DType::kFloat64;
  Place place;
};

// Checks parameters and state.
PreparedAveragedSgd prepare(const ReceivedAveragedSgd& r);

// Checks the gradients and the numbers of a step, and says what the kernel takes. Both pointers must outlive its run.
AveragedSgdStep complete(const ReceivedAveragedSgd& r, const Tensors& grads, PreparedAveragedSgd* prepared,
                         SparseGradients* sparse);

// Runs the kernel where `first` is.
void averaged_sgd_run(const AveragedSgdStep& step, const Tensor& first);

// One step. Nothing is written before everything has been checked; nothing at all if `check_only`.
void averaged_sgd_update(const ReceivedAveragedSgd& r, const Tensors& grads, bool check_only);

}  // namespace paddle_asgd
