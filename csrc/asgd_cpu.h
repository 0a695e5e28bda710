// SPDX-License-Identifier: Apache-2.0
// What the CPU's files of SAG share: the step calls the watch and the sum of the history. Must not loop over elements.
#pragma once

#include <algorithm>
#include <vector>

#include "asgd_step.h"

namespace paddle_asgd {

// The divisors of one step. Weights that have not all been seen are a sum over the slots, so the last divisor is kept:
// nearly always the next tensor has the same clock.
class Divisors {
 public:
  double of(const Visit& visit, const TensorArgs& t, const StepArgs& step) {
    if (step.batch_weights == nullptr || visit.seen == step.batch_num) return divisor(visit, t, step);
    // With a batch index any slot may be marked, so the whole clock is compared.
    const int64_t length = step.batch_index.given ? clock_length(step.batch_num) : 1;
    if (!std::equal(clock_.begin(), clock_.end(), t.m, t.m + length)) {
      clock_.assign(t.m, t.m + length);
      last_ = divisor(visit, t, step);
    }
    return last_;
  }

 private:
  std::vector<int64_t> clock_;
  double last_ = 0;
};

// Adds to `sums`, of `length` doubles, the slots of the elements from `begin` on, which begins a block of scales.
using SumFunction = void (*)(double* sums, const TensorArgs& t, int64_t begin, const double* weights, int64_t n,
                             int64_t length);
SumFunction sum_function(const TensorArgs& t, bool weighted);  // asgd_refresh_cpu.cc

// Must run before the step replaces what is compared; asgd_watch_cpu.cc.
void watch_slots(const StepArgs& step);

}  // namespace paddle_asgd
