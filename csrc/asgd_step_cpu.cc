// SPDX-License-Identifier: Apache-2.0
// The step on the CPU: a loop over the tensors, and inside it the loops over the elements. Must not include Paddle,
// and must not write the formula again (asgd_formula.h). What a function inlines is compiled with it in each clone;
// a function that is only called would be compiled once, for the oldest processor.
#include <algorithm>
#include <type_traits>

#include "asgd_cpu.h"
#include "asgd_gradient.h"
#include "asgd_history.h"
#include "asgd_watch.h"
#include "storage.h"

namespace paddle_asgd {
namespace {

// Returns the weights from `begin` on in the type of the arithmetic. A 16-bit parameter without master weights is
// copied to `wide`; whatever changes the weights must write them back with round_weights().
template <bool kMaster, typename P, typename G, typename T>
PADDLE_ASGD_INLINE T* widen_weights(const Typed<P, G, T>& t, int64_t begin, int64_t length, T* wide) {
  if constexpr (std::is_same<P, T>::value) return t.param + begin;
  if (kMaster) return t.master + begin;
  if constexpr (!std::is_same<P, T>::value) widen_array(t.param + begin, wide, length);
  return wide;
}

// A master weight is updated in place, so only the rounded parameter is left to write.
template <typename P, typename G, typename T>
PADDLE_ASGD_INLINE void round_weights(const Typed<P, G, T>& t, int64_t begin, int64_t length, const T* x) {
  if constexpr (!std::is_same<P, T>::value) narrow_array(x, t.param + begin, length);
}

// The four arrays never overlap; without __restrict__ the compiler has to test that before each loop. Whether there is
// a theta is a template parameter, which keeps a test out of the loop.
template <typename G, typename T, bool kTheta>
PADDLE_ASGD_INLINE void update(T* __restrict__ x, const G* __restrict__ grad, T* __restrict__ d, G* __restrict__ y_i,
                               Coefficients<T> c, int64_t length) {
  for (int64_t e = 0; e < length; ++e) {
    // The copy goes through a value, because gcc does not vectorise one from a 16-bit struct in memory to another.
    const G g = grad[e];
    const T old = widen(y_i[e]), sum = replace_gradient<T>(d[e], old, widen(g), c.weight);
    x[e] = kTheta ? descend_theta<T>(x[e], d[e], old, widen(g), c) : descend<T>(x[e], sum, c);
    d[e] = sum;
    y_i[e] = g;
  }
}

// 16-bit parameters are updated a block at a time.
template <typename P, typename G, bool kMaster, bool kTheta>
PADDLE_ASGD_INLINE void update_block(const Typed<P, G, float>& t, const G* grad, Coefficients<float> c, int64_t begin,
                                     int64_t length) {
  float wide[kBlock];
  float* x = widen_weights<kMaster>(t, begin, length, wide);
  if constexpr (std::is_same<G, Float16>::value) {
    // The processor's conversions work on arrays (storage.h). The widened y_i is scratch, which update() overwrites.
    float wide_grad[kBlock], wide_y_i[kBlock];
    widen_array(grad, wide_grad, length);
    widen_array(t.y_i + begin, wide_y_i, length);
    update<float, float, kTheta>(x, wide_grad, t.d + begin, wide_y_i, c, length);
    // The bits are copied, not rounded from `wide_grad`, so that a NaN keeps its payload as on a GPU.
    std::copy(grad, grad + length, t.y_i + begin);
  } else {
    update<G, float, kTheta>(x, grad, t.d + begin, t.y_i + begin, c, length);
  }
  round_weights(t, begin, length, x);
}

// Returns a gradient in the type of the arithmetic, where it is or copied to `wide`.
template <typename T, typename G>
PADDLE_ASGD_INLINE const T* widen_gradient(const G* grad, int64_t length, T* wide) {
  if constexpr (std::is_same<G, T>::value) return grad;
  if constexpr (!std::is_same<G, T>::value) widen_array(grad, wide, length);
  return wide;
}

// The history of a tensor as far as Typed has none of it.
template <typename T>
struct Stored {
  NarrowSlot<T> slot;  // of this step's batch, where the history is narrow
  SumFunction sum;
  const TensorArgs& tensor;
  const StepArgs& step;

  bool is_narrow() const { return slot.storage != nullptr; }
  void add_up(double* sums, int64_t begin, int64_t length) const {
    sum(sums, tensor, begin, step.batch_weights, step.batch_num, length);
  }
};

// Only 16-bit numbers pass through buffers.
template <typename P, typename G, typename T, bool kMaster>
PADDLE_ASGD_INLINE void update_narrow(const Typed<P, G, T>& t, const Gradient<G>& gradient, const NarrowSlot<T>& slot,
                                      Coefficients<T> c, bool has_theta, Range range) {
  constexpr bool kWide = std::is_same<P, T>::value;
  G room[kBlock];
  T wide[kBlock], wide_grad[kBlock];
  const int64_t block = kWide && gradient.rows == nullptr ? range.end - range.begin : kBlock;
  for (int64_t begin = range.begin; begin < range.end; begin += block) {
    const int64_t length = std::min(block, range.end - begin);
    const T* g = widen_gradient<T>(gradient.stretch(begin, length, room), length, wide_grad);
    T* x = widen_weights<kMaster>(t, begin, length, wide);
    slot.update(x, g, t.d + begin, begin, length, c, has_theta);
    round_weights(t, begin, length, x);
  }
}

template <typename P, typename G, typename T, bool kMaster, bool kTheta>
PADDLE_ASGD_INLINE void update_range(const Typed<P, G, T>& t, const Gradient<G>& gradient, const Stored<T>& history,
                                     Coefficients<T> c, Range range) {
  if (history.is_narrow()) return update_narrow<P, G, T, kMaster>(t, gradient, history.slot, c, kTheta, range);
  // Parameters that are as wide as the arithmetic need no buffers beside them.
  constexpr bool kWide = std::is_same<P, T>::value;
  G room[kBlock];
  // A dense gradient is read where it lies, so the whole range is one block.
  const int64_t block = kWide && gradient.rows == nullptr ? range.end - range.begin : kBlock;
  for (int64_t begin = range.begin; begin < range.end; begin += block) {
    const int64_t length = std::min(block, range.end - begin);
    const G* grad = gradient.stretch(begin, length, room);
    if constexpr (kWide) {
      update<G, T, kTheta>(t.param + begin, grad, t.d + begin, t.y_i + begin, c, length);
    } else {
      update_block<P, G, kMaster, kTheta>(t, grad, c, begin, length);
    }
  }
}

// Computes d anew for at most one unit. With a theta x has moved already, by d and y_i as they were before the step.
template <typename P, typename G, typename T, bool kMaster, bool kTheta>
PADDLE_ASGD_INLINE void refresh_unit(const Typed<P, G, T>& t, const Gradient<G>& gradient, const Stored<T>& history,
                                     Coefficients<T> c, Range fresh) {
  const int64_t begin = fresh.begin, length = fresh.end - fresh.begin;
  G room[kRefreshUnit];
  T wide[kRefreshUnit];
  const G* grad = gradient.stretch(begin, length, room);
  // The gradient is stored first, because the sum is that of the history as this step leaves it.
  if (history.is_narrow()) {
    history.slot.write(begin, length, widen_gradient<T>(grad, length, wide));
  } else {
    std::copy(grad, grad + length, t.y_i + begin);
  }
  double sums[kRefreshUnit] = {};
  history.add_up(sums, begin, length);
  T* d = t.d + begin;
  for (int64_t j = 0; j < length; ++j) d[j] = static_cast<T>(sums[j]);
  if (kTheta) return;
  T* x = widen_weights<kMaster>(t, begin, length, wide);
  for (int64_t j = 0; j < length; ++j) x[j] = descend<T>(x[j], d[j], c);
  round_weights(t, begin, length, x);
}

template <typename P, typename G, typename T, bool kMaster, bool kTheta>
PADDLE_ASGD_INLINE void update_all(const Typed<P, G, T>& t, const Gradient<G>& gradient, const Stored<T>& history,
                                   Coefficients<T> c, const Refresh& refresh) {
  // The tensor is walked through once, so that what was just updated is still in the cache when it is recomputed.
  int64_t begin = 0;
  for (int64_t span = refresh.first; span < refresh.last; ++span) {
    const Range fresh = refreshed_in(refresh, span, t.numel);
    // SAG moves x by d as it will be, so refresh_unit() must move the fresh elements. A theta moves them by the old d.
    update_range<P, G, T, kMaster, kTheta>(t, gradient, history, c, Range{begin, kTheta ? fresh.end : fresh.begin});
    if (fresh.begin < fresh.end) refresh_unit<P, G, T, kMaster, kTheta>(t, gradient, history, c, fresh);
    begin = fresh.end;
  }
  update_range<P, G, T, kMaster, kTheta>(t, gradient, history, c, Range{begin, t.numel});
}

template <typename P, typename G, typename T, bool kMaster>
PADDLE_ASGD_INLINE void step_tensor(const TensorArgs& t, const Visit& visit, double seen, const StepArgs& step) {
  const Coefficients<T> c = coefficients_of<T>(step, visit, seen);
  const Refresh refresh = refresh_of(*t.m, step.batch_num, t.numel);
  const Typed<P, G, T> tensor = typed<P, G, T>(t, visit.slot);
  const Gradient<G> gradient = gradient_of<G>(t, step);
  const Stored<T> history{narrow_slot<T>(t, visit.slot), sum_function(t, step.batch_weights != nullptr), t, step};
  if (step.has_theta) {
    update_all<P, G, T, kMaster, true>(tensor, gradient, history, c, refresh);
  } else {
    update_all<P, G, T, kMaster, false>(tensor, gradient, history, c, refresh);
  }
  // The clock advances last, because the slot, the divisor and the refresh are those of the clock before the step.
  advance(t.m, visit, step.batch_index.given);
}

// Function templates cannot be cloned, so each combination of storage types gets a function of its own.
#define PADDLE_ASGD_STEP(name, P, G, T, kMaster)                                                                  \
  PADDLE_ASGD_CLONES void name(const TensorArgs& tensor, const Visit& visit, double seen, const StepArgs& step) { \
    step_tensor<P, G, T, kMaster>(tensor, visit, seen, step);                                                     \
  }
PADDLE_ASGD_STEP(step_float32, float, float, float, false)
PADDLE_ASGD_STEP(step_float64, double, double, double, false)
PADDLE_ASGD_STEP(step_float16, Float16, Float16, float, false)
PADDLE_ASGD_STEP(step_float16_master, Float16, Float16, float, true)
PADDLE_ASGD_STEP(step_float16_grad32, Float16, float, float, false)
PADDLE_ASGD_STEP(step_float16_grad32_master, Float16, float, float, true)
PADDLE_ASGD_STEP(step_bfloat16, BFloat16, BFloat16, float, false)
PADDLE_ASGD_STEP(step_bfloat16_master, BFloat16, BFloat16, float, true)
PADDLE_ASGD_STEP(step_bfloat16_grad32, BFloat16, float, float, false)
PADDLE_ASGD_STEP(step_bfloat16_grad32_master, BFloat16, float, float, true)
#undef PADDLE_ASGD_STEP

using StepFunction = void (*)(const TensorArgs&, const Visit&, double, const StepArgs&);

// Theta and weights are told apart inside these functions, because each would double the number of them to compile.
StepFunction choose(const TensorArgs& t) {
  const bool grad32 = t.grad_dtype == DType::kFloat32, master = t.master != nullptr;
  switch (t.param_dtype) {
    case DType::kFloat64:
      return step_float64;
    case DType::kFloat16:
      if (grad32) return master ? step_float16_grad32_master : step_float16_grad32;
      return master ? step_float16_master : step_float16;
    case DType::kBFloat16:
      if (grad32) return master ? step_bfloat16_grad32_master : step_bfloat16_grad32;
      return master ? step_bfloat16_master : step_bfloat16;
    case DType::kFloat32:
      break;
  }
  return step_float32;
}

// The first lines of a later tensor are fetched, because small tensors wait for memory more than they compute. Its slot
// is taken to be this tensor's; where they differ, the line is fetched in vain.
constexpr int64_t kTensorsAhead = 3, kLine = 64, kLinesAhead = 4;

PADDLE_ASGD_INLINE void fetch_ahead(const TensorArgs& t, int64_t slot) {
  const int64_t item = t.grad_dtype == DType::kFloat64 ? 8 : t.grad_dtype == DType::kFloat32 ? 4 : 2;
  const int64_t stored = t.history == History::kExact ? item : narrow_size(t.history);
  const char* y_i = static_cast<const char*>(t.y) + slot * t.numel * stored;
  const int64_t bytes = std::min(t.numel * item, kLine * kLinesAhead);
  for (int64_t at = 0; at < bytes; at += kLine) {
    __builtin_prefetch(static_cast<const char*>(t.grad) + at);
    __builtin_prefetch(static_cast<const char*>(t.param) + at, 1);
    __builtin_prefetch(static_cast<const char*>(t.d) + at, 1);
    __builtin_prefetch(y_i + at, 1);
  }
  __builtin_prefetch(t.m, 1);
}

}  // namespace

void asgd_cpu(const StepArgs& step) {
  // These tests come before anything is written. A step that found an Inf is no refusal, whatever its index is.
  if (step.found_inf != nullptr && *step.found_inf) return;
  if (!takes_step(step)) {
    if (step.watch != nullptr) refuse_index(step.watch, load(step.batch_index));
    return;
  }
  // The loop below replaces what the watch compares.
  if (step.watch != nullptr && step.count > 0) watch_slots(step);
  Divisors divisors;
  for (int64_t i = 0; i < step.count; ++i) {
    const TensorArgs& t = step.tensors[i];
    const Visit visit = visit_of(t, step);
    if (i + kTensorsAhead < step.count) fetch_ahead(step.tensors[i + kTensorsAhead], visit.slot);
    choose(t)(t, visit, divisors.of(visit, t, step), step);
  }
  // The pass ends behind the last tensor, so that its sums are those of whole steps.
  if (step.watch != nullptr) close_step(step.watch, step.batch_num);
}

}  // namespace paddle_asgd
