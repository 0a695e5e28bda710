// The step on the CPU: a loop over the tensors, and inside it the loops over the elements. Must not include Paddle,
// and must not write the formula again (asgd_formula.h).
#include <algorithm>

#include "asgd_formula.h"
#include "asgd_kernel.h"

// One copy of each loop per instruction set, chosen when the library is loaded: no -march=native, yet vector code.
// PADDLE_ASGD_NO_CLONES is for sanitizers, which run before the loader can choose.
#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__) || defined(PADDLE_ASGD_NO_CLONES)
#define PADDLE_ASGD_CLONES
#elif __GNUC__ >= 12
#define PADDLE_ASGD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PADDLE_ASGD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

namespace paddle_asgd {
namespace {

#define PADDLE_ASGD_INLINE inline __attribute__((always_inline))

// x is the master weight where there is one, else the parameter itself.
template <typename P, typename T, bool kMaster>
PADDLE_ASGD_INLINE void descend_element(P* param, T* master, T d, Coefficients<T> c, int64_t e) {
  const T x = descend<T>(kMaster ? master[e] : widen(param[e]), d, c);
  if (kMaster) master[e] = x;
  narrow(x, &param[e]);
}

template <typename P, typename G, typename T, bool kMaster>
PADDLE_ASGD_INLINE void update(P* __restrict__ param, const G* __restrict__ grad, T* __restrict__ d,
                               G* __restrict__ y_i, T* __restrict__ master, Coefficients<T> c, Range range) {
  for (int64_t e = range.begin; e < range.end; ++e) {
    // By way of a value: gcc does not vectorise a copy from one 16-bit struct in memory to another.
    const G g = grad[e];
    const T sum = replace_gradient<T>(d[e], widen(y_i[e]), widen(g));
    d[e] = sum;
    y_i[e] = g;
    descend_element<P, T, kMaster>(param, master, sum, c, e);
  }
}

// Adds kSlots slots to the sums, in their order.
template <int kSlots, typename G>
PADDLE_ASGD_INLINE void add_slots(double* __restrict__ sums, const G* __restrict__ y_i, int64_t numel, int64_t length) {
  for (int64_t j = 0; j < length; ++j) {
    double sum = sums[j];
#pragma GCC unroll 8
    for (int k = 0; k < kSlots; ++k) sum += static_cast<double>(widen(y_i[k * numel + j]));
    sums[j] = sum;
  }
}

// As update(), for a range whose sums are recomputed from the history. A unit's sums stay in the first-level cache,
// and eight slots are read at once: one stream of memory alone is far from the bandwidth that the rest of the step
// gets.
template <typename P, typename G, typename T, bool kMaster>
PADDLE_ASGD_INLINE void update_refreshed(P* __restrict__ param, const G* __restrict__ grad, T* __restrict__ d,
                                         G* __restrict__ y, T* __restrict__ master, Coefficients<T> c, Range range,
                                         int64_t slot, int64_t n, int64_t numel) {
  std::copy(grad + range.begin, grad + range.end, y + slot * numel + range.begin);
  for (int64_t begin = range.begin; begin < range.end; begin += kRefreshUnit) {
    const int64_t length = std::min(kRefreshUnit, range.end - begin);
    double sums[kRefreshUnit] = {};
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) add_slots<8>(sums, y + i * numel + begin, numel, length);
    for (; i < n; ++i) add_slots<1>(sums, y + i * numel + begin, numel, length);
    for (int64_t j = 0; j < length; ++j) {
      d[begin + j] = static_cast<T>(sums[j]);
      descend_element<P, T, kMaster>(param, master, d[begin + j], c, begin + j);
    }
  }
}

template <typename P, typename G, typename T, bool kMaster>
PADDLE_ASGD_INLINE void step_tensor(const TensorArgs& t, const StepArgs& step) {
  const int64_t m = *t.m, n = step.batch_num, slot = slot_of_step(m, n);
  const Coefficients<T> c = coefficients<T>(load(step.learning_rate), load(step.weight_decay), m, n);
  const Range fresh = refresh_range(m, n, t.numel);
  P* param = static_cast<P*>(t.param);
  const G* grad = static_cast<const G*>(t.grad);
  T* d = static_cast<T*>(t.d);
  G* y = static_cast<G*>(t.y);
  T* master = static_cast<T*>(t.master);
  G* y_i = y + slot * t.numel;
  update<P, G, T, kMaster>(param, grad, d, y_i, master, c, Range{0, fresh.begin});
  update_refreshed<P, G, T, kMaster>(param, grad, d, y, master, c, fresh, slot, n, t.numel);
  update<P, G, T, kMaster>(param, grad, d, y_i, master, c, Range{fresh.end, t.numel});
  *t.m = next_step(m);
}

// Function templates cannot be cloned, so each combination of storage types gets a function of its own.
#define PADDLE_ASGD_STEP(name, P, G, T, kMaster)                                 \
  PADDLE_ASGD_CLONES void name(const TensorArgs& tensor, const StepArgs& step) { \
    step_tensor<P, G, T, kMaster>(tensor, step);                                 \
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

using StepFunction = void (*)(const TensorArgs&, const StepArgs&);

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

}  // namespace

void asgd_cpu(const StepArgs& step) {
  if (step.found_inf != nullptr && *step.found_inf) return;
  for (int64_t i = 0; i < step.count; ++i) choose(step.tensors[i])(step.tensors[i], step);
}

}  // namespace paddle_asgd
