// SPDX-License-Identifier: Apache-2.0
// The step of averaged SGD on the CPU: a loop over the tensors, and inside it the loops over the elements. Must not
// include Paddle, and must not write the formula again (average_formula.h).
#include <algorithm>
#include <type_traits>

#include "average_sgd_kernel.h"
#include "platform.h"
#include "storage.h"

namespace paddle_asgd {
namespace {

template <bool kAverages, typename G, typename T>
PADDLE_ASGD_INLINE void update(T* __restrict__ x, const G* __restrict__ grad, T* __restrict__ ax,
                               const AveragedSgdCoefficients<T> c, int64_t length) {
  for (int64_t e = 0; e < length; ++e) {
    x[e] = descend_averaged<T>(x[e], widen(grad[e]), c);
    if (kAverages) ax[e] = average<T>(ax[e], x[e], c.mu);
  }
}

template <typename T>
PADDLE_ASGD_INLINE void follow(T* __restrict__ ax, const T* __restrict__ x, T mu, int64_t length) {
  for (int64_t e = 0; e < length; ++e) ax[e] = average<T>(ax[e], x[e], mu);
}

// A block of a 16-bit parameter. The average follows the master weight, and where there is none the parameter as it was
// rounded: those are the weights that the steps go by.
template <typename P, typename G>
PADDLE_ASGD_INLINE void update_block(const AveragedSgdTyped<P, G, float>& t, const G* grad,
                                     const AveragedSgdCoefficients<float>& c, int64_t begin, int64_t length) {
  float wide[kBlock];
  float* x = t.master == nullptr ? wide : t.master + begin;
  if (t.master == nullptr) widen_array(t.param + begin, wide, length);
  if constexpr (std::is_same<G, Float16>::value) {
    float wide_grad[kBlock];
    widen_array(grad, wide_grad, length);
    update<false>(x, wide_grad, static_cast<float*>(nullptr), c, length);
  } else {
    update<false>(x, grad, static_cast<float*>(nullptr), c, length);
  }
  narrow_array(x, t.param + begin, length);
  if (t.ax == nullptr) return;
  if (t.master == nullptr) widen_array(t.param + begin, wide, length);
  follow(t.ax + begin, x, c.mu, length);
}

template <typename P, typename G, typename T>
PADDLE_ASGD_INLINE void step_tensor(const AveragedSgdTensor& tensor, const AveragedSgdStep& step, double eta) {
  const AveragedSgdTyped<P, G, T> t = typed<P, G, T>(tensor);
  const Gradient<G> gradient = gradient_at<G>(t.grad, step.gradient_rows, &tensor - step.tensors);
  const AveragedSgdCoefficients<T> c = averaged_sgd_coefficients<T>(tensor, step, eta);
  constexpr bool kWide = std::is_same<P, T>::value;
  G room[kBlock];
  // Where nothing has to be put together, one block is all.
  const int64_t block = kWide && gradient.rows == nullptr ? std::max<int64_t>(t.numel, 1) : kBlock;
  for (int64_t begin = 0; begin < t.numel; begin += block) {
    const int64_t length = std::min(block, t.numel - begin);
    const G* grad = gradient.stretch(begin, length, room);
    if constexpr (!kWide) {
      update_block(t, grad, c, begin, length);
    } else if (t.ax == nullptr) {
      update<false>(t.param + begin, grad, static_cast<T*>(nullptr), c, length);
    } else {
      update<true>(t.param + begin, grad, t.ax + begin, c, length);
    }
  }
}

// Function templates cannot be cloned, so each pair of storage types gets a function of its own.
#define PADDLE_ASGD_STEP(name, P, G, T)                                                                    \
  PADDLE_ASGD_CLONES void name(const AveragedSgdTensor& tensor, const AveragedSgdStep& step, double eta) { \
    step_tensor<P, G, T>(tensor, step, eta);                                                               \
  }
PADDLE_ASGD_STEP(step_float32, float, float, float)
PADDLE_ASGD_STEP(step_float64, double, double, double)
PADDLE_ASGD_STEP(step_float16, Float16, Float16, float)
PADDLE_ASGD_STEP(step_float16_grad32, Float16, float, float)
PADDLE_ASGD_STEP(step_bfloat16, BFloat16, BFloat16, float)
PADDLE_ASGD_STEP(step_bfloat16_grad32, BFloat16, float, float)
#undef PADDLE_ASGD_STEP

using StepFunction = void (*)(const AveragedSgdTensor&, const AveragedSgdStep&, double);

StepFunction choose(const AveragedSgdTensor& t) {
  const bool grad32 = t.grad_dtype == DType::kFloat32;
  switch (t.param_dtype) {
    case DType::kFloat64:
      return step_float64;
    case DType::kFloat16:
      return grad32 ? step_float16_grad32 : step_float16;
    case DType::kBFloat16:
      return grad32 ? step_bfloat16_grad32 : step_bfloat16;
    case DType::kFloat32:
      break;
  }
  return step_float32;
}

// A power costs as much as a small tensor, and nearly always neighbouring tensors have taken as many steps.
class Etas {
 public:
  explicit Etas(const AveragedSgdStep& step) : step_(step) {}
  double after(int64_t steps) {
    if (steps != last_steps_) {
      last_ = eta_after(step_, steps);
      last_steps_ = steps;
    }
    return last_;
  }

 private:
  const AveragedSgdStep& step_;
  int64_t last_steps_ = -1;  // no clock is negative
  double last_ = 0;
};

}  // namespace

void average_sgd_cpu(const AveragedSgdStep& step) {
  // Before anything is written: such a step leaves all tensors and their clocks as they were.
  if (step.found_inf != nullptr && *step.found_inf) return;
  Etas etas(step);
  for (int64_t i = 0; i < step.count; ++i) {
    const AveragedSgdTensor& t = step.tensors[i];
    choose(t)(t, step, t.eta == nullptr ? etas.after(*t.steps) : kept_eta(t, step));
    // Behind the elements, whose coefficients are those of the clock before the step.
    advance(t, step.eta_dtype, t.eta == nullptr ? 0 : etas.after(*t.steps + 1));
  }
}

}  // namespace paddle_asgd
