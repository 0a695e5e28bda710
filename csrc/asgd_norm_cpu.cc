// SPDX-License-Identifier: Apache-2.0
// The norm of the known gradient on the CPU. Must not write to a tensor, nor take the root (gradient_norm.py does).
#include "asgd_step.h"
#include "half.h"

namespace paddle_asgd {
namespace {

// In double, because float32 would lose the squares of small numbers beside those of large ones.
template <typename P, typename T>
double sum_of_squares(const TensorArgs& t, double weight_decay, double weight_seen) {
  const T* d = static_cast<const T*>(t.d);
  double sum = 0;
  for (int64_t e = 0; e < t.numel; ++e) {
    // The master weight is the parameter; a 16-bit one beside it is only its rounded copy.
    const T x = t.master == nullptr ? widen(static_cast<const P*>(t.param)[e]) : static_cast<const T*>(t.master)[e];
    const double known = known_gradient<T>(x, d[e], weight_decay, weight_seen);
    sum += known * known;
  }
  return sum;
}

using NormFunction = double (*)(const TensorArgs&, double, double);
// A type that is added to DType must be added here at the same position.
constexpr NormFunction kNorm[] = {sum_of_squares<float, float>, sum_of_squares<double, double>,
                                  sum_of_squares<Float16, float>, sum_of_squares<BFloat16, float>};

}  // namespace

void asgd_norm_cpu(const StepArgs& step, double* sum) {
  for (int64_t i = 0; i < step.count; ++i) {
    const TensorArgs& t = step.tensors[i];
    const double known = weight_known(t.m, step.batch_index.given, step.batch_num, step.batch_weights);
    // No gradient has ever reached this tensor, and the division would make its zeros NaN.
    if (known == 0) continue;
    *sum += kNorm[static_cast<int>(t.param_dtype)](t, load(step.weight_decay), known);
  }
}

}  // namespace paddle_asgd
