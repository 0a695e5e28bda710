// Makes tensors and steps, and hands them to the kernel that was chosen. Must not check anything but errors.
#pragma once

#include <initializer_list>

#include "tensors.h"

namespace native_test {

using paddle_asgd::Scalar;
using paddle_asgd::StepArgs;

constexpr double kRate = 0.075, kDecay = 0.3;

inline Scalar number(double value) { return Scalar{nullptr, DType::kFloat64, value}; }

inline StepArgs step_args(const std::vector<paddle_asgd::TensorArgs>& args, int64_t n) {
  return StepArgs{args.data(), static_cast<int64_t>(args.size()), n, number(kRate), number(kDecay), nullptr};
}

inline std::vector<paddle_asgd::TensorArgs> args_of(const Tensors& tensors) {
  std::vector<paddle_asgd::TensorArgs> args;
  for (const auto& tensor : tensors) args.push_back(tensor->args());
  return args;
}

inline bool on_cuda = false;

// The first argument of a program of tests: cpu or cuda.
inline void choose_kernel(int argc, char** argv) {
  const std::string kernel = argc > 1 ? argv[1] : "";
  CHECK(kernel == "cpu" || kernel == "cuda", "received '%s', expected cpu or cuda", kernel.c_str());
  on_cuda = kernel == "cuda";
}

inline void run(const StepArgs& step) {
  if (!on_cuda) return paddle_asgd::asgd_cpu(step);
  const char* error = paddle_asgd::asgd_cuda(step, 0, nullptr);
  CHECK(error == nullptr, "%s", error);
}

inline void take_step(const Tensors& tensors, int64_t n) {
  const auto args = args_of(tensors);
  run(step_args(args, n));
}

inline Tensors make(const Types& types, std::initializer_list<int64_t> sizes, int64_t n, int64_t offset,
                    Random* random) {
  Tensors tensors;
  for (const int64_t numel : sizes) {
    tensors.emplace_back(new Tensor(types, numel, n, offset));
    for (int64_t e = 0; e < numel; ++e) tensors.back()->set_weight(e, random->number());
  }
  return tensors;
}

// Depends on the weight, the step and the element.
inline void set_gradients(Tensor* t, Random* random) {
  for (int64_t e = 0; e < t->numel; ++e) t->grad.put(e, 0.375 * t->param.at(e) + random->number());
}

// In the order in which both kernels add.
inline double sum_of_history(const Tensor& t, int64_t n, int64_t e) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += t.y.at(i * t.numel + e);
  return sum;
}

}  // namespace native_test
