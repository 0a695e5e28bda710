// SPDX-License-Identifier: Apache-2.0
// The step of tensors alike for whoever loads this as a shared library, in order to look at it with a profiler. Must
// not allocate or wait.
#include <cstdint>
#include <vector>

#include "asgd_kernel.h"

// The arrays run parallel; `master` is null, or an array. Returns CUDA's words about what went wrong, or null.
extern "C" const char* take_step(int64_t count, void** param, void** grad, void** d, void** y, void** m, void** master,
                                 const int64_t* numel, int dtype, int64_t n, double* watch, void* stream) {
  using paddle_asgd::DType;
  std::vector<paddle_asgd::TensorArgs> tensors;
  for (int64_t i = 0; i < count; ++i) {
    paddle_asgd::TensorArgs t{};
    t.param = param[i], t.grad = grad[i], t.d = d[i], t.y = y[i], t.m = static_cast<int64_t*>(m[i]);
    t.master = master == nullptr ? nullptr : master[i];
    t.numel = numel[i], t.param_dtype = t.grad_dtype = static_cast<DType>(dtype);
    tensors.push_back(t);
  }
  paddle_asgd::StepArgs step{};
  step.tensors = tensors.data();
  step.count = count;
  step.batch_num = n;
  step.learning_rate = {nullptr, DType::kFloat64, 1e-7};
  step.weight_decay = {nullptr, DType::kFloat64, 1e-4};
  step.watch = watch;
  return paddle_asgd::asgd_cuda(step, 0, stream);
}
