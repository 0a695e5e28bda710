// SPDX-License-Identifier: Apache-2.0
// What both doors hand over for SAG, and the functions behind them. Must not know how an operator or a Python function
// arrives.
#pragma once

#include <optional>
#include <vector>

#include "asgd_kernel.h"
#include "paddle_op.h"
#include "paddle_rows.h"

namespace paddle_asgd {

// The arguments of one step as both doors deliver them, but for the gradients. All lists but y_scale run parallel to
// `params`.
struct Received {
  Tensors params, d, y, m;
  std::optional<Tensors> masters;
  std::optional<Tensors> y_scale;  // shorter: one for each y of int8 or int16, in their order
  Number learning_rate;
  Number weight_decay;
  const Tensor* found_inf = nullptr;
  bool has_batch_index = false;
  const Tensor* batch_index = nullptr;
  int64_t batch_index_value = 0;
  const Tensor* batch_weights = nullptr;
  bool has_theta = false;
  Number theta;
  const Tensor* watch = nullptr;
};

// What does not change from step to step as long as no tensor does: where parameters and state lie.
struct Prepared {
  std::vector<TensorArgs> tensors;
  int64_t batch_num = 0;
  Place place;
};

// Checks parameters and state.
Prepared prepare(const Received& r);

// Checks the gradients and the numbers of a step, and says what the kernel takes. Both pointers must outlive its run.
StepArgs complete(const Received& r, const Tensors& grads, Prepared* prepared, SparseGradients* sparse);

// Runs the kernel where `first` is.
void asgd_run(const StepArgs& step, const Tensor& first);

// One step. Nothing is written before everything has been checked; nothing at all if `check_only`.
void asgd_update(const Received& r, const Tensors& grads, bool check_only);

// The squares of the whole gradient as far as the histories know it, added to `sum`. An empty list adds nothing.
void asgd_norm(const Received& r, int64_t batch_num, const Tensor& sum);

}  // namespace paddle_asgd
