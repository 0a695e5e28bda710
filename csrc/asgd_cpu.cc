// SPDX-License-Identifier: Apache-2.0
// The step on the CPU: a loop over the tensors, and inside it the loops over the elements. Must not include Paddle,
// and must not write the formula again (asgd_formula.h).
#include <algorithm>
#include <type_traits>
#include <vector>

#include "asgd_gradient.h"
#include "asgd_step.h"
#include "asgd_watch.h"
#include "platform.h"
#include "storage.h"

namespace paddle_asgd {
namespace {

// Forced, so that the loops are compiled within each clone and take its instruction set. A function that is only called
// would be compiled once, for the oldest processor.
#define PADDLE_ASGD_INLINE inline __attribute__((always_inline))

// The weights from `begin` on in the type of the arithmetic: in place, or of a 16-bit parameter without master weights
// a copy in `wide`. What is done to them goes back by round_weights().
template <bool kMaster, typename P, typename G, typename T>
PADDLE_ASGD_INLINE T* widen_weights(const Typed<P, G, T>& t, int64_t begin, int64_t length, T* wide) {
  if constexpr (std::is_same<P, T>::value) return t.param + begin;
  if (kMaster) return t.master + begin;
  if constexpr (!std::is_same<P, T>::value) widen_array(t.param + begin, wide, length);
  return wide;
}

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
    // By way of a value: gcc does not vectorise a copy from one 16-bit struct in memory to another.
    const G g = grad[e];
    const T old = widen(y_i[e]), sum = replace_gradient<T>(d[e], old, widen(g), c.weight);
    x[e] = kTheta ? descend_theta<T>(x[e], d[e], old, widen(g), c) : descend<T>(x[e], sum, c);
    d[e] = sum;
    y_i[e] = g;
  }
}

// 16-bit parameters are updated a block at a time, while it is in the first-level cache. Rounding them in a pass of its
// own is measured to be faster than in the loop, for bfloat16 too. With 1,024 elements the buffers no longer fit beside
// the tensors, all of which begin on a page.
constexpr int64_t kBlock = 512;

template <typename P, typename G, bool kMaster, bool kTheta>
PADDLE_ASGD_INLINE void update_block(const Typed<P, G, float>& t, const G* grad, Coefficients<float> c, int64_t begin,
                                     int64_t length) {
  float wide[kBlock];
  float* x = widen_weights<kMaster>(t, begin, length, wide);
  if constexpr (std::is_same<G, Float16>::value) {
    float wide_grad[kBlock], wide_y_i[kBlock];
    widen_array(grad, wide_grad, length);
    widen_array(t.y_i + begin, wide_y_i, length);
    update<float, float, kTheta>(x, wide_grad, t.d + begin, wide_y_i, c, length);
    // The bits themselves, not rounded from `wide_grad`: a NaN keeps its payload, as on a GPU.
    std::copy(grad, grad + length, t.y_i + begin);
  } else {
    update<G, float, kTheta>(x, grad, t.d + begin, t.y_i + begin, c, length);
  }
  round_weights(t, begin, length, x);
}

template <typename P, typename G, typename T, bool kMaster, bool kTheta>
PADDLE_ASGD_INLINE void update_range(const Typed<P, G, T>& t, const Gradient<G>& gradient, Coefficients<T> c,
                                     Range range) {
  // Parameters that are as wide as the arithmetic need no buffers beside them.
  constexpr bool kWide = std::is_same<P, T>::value;
  G room[kBlock];
  // Where nothing has to be put together, one block is all.
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

// Adds kSlots slots to the sums, in their order.
template <int kSlots, bool kWeighted, typename G, typename T>
PADDLE_ASGD_INLINE void add_slots(double* __restrict__ sums, const G* __restrict__ y_i, const double* weights,
                                  int64_t numel, int64_t length) {
  double rounded[kSlots] = {};
  // As the step rounds them, so that both sums are of the same numbers.
  for (int k = 0; kWeighted && k < kSlots; ++k) rounded[k] = static_cast<double>(static_cast<T>(weights[k]));
  for (int64_t j = 0; j < length; ++j) {
    double sum = sums[j];
// Unrolled whole: eight streams of memory at once are what this function is for.
#pragma GCC unroll 8
    for (int k = 0; k < kSlots; ++k) {
      const double stored = static_cast<double>(widen(y_i[k * numel + j]));
      sum += kWeighted ? rounded[k] * stored : stored;
    }
    sums[j] = sum;
  }
}

// The sums of one unit, anew. They stay in the first-level cache, and eight slots are read at once: one stream of
// memory alone is far from the bandwidth that the rest of the step gets.
template <bool kWeighted, typename G, typename T>
PADDLE_ASGD_INLINE void sum_history(double* sums, const G* y, const double* weights, int64_t n, int64_t numel,
                                    int64_t length) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    add_slots<8, kWeighted, G, T>(sums, y + i * numel, kWeighted ? weights + i : nullptr, numel, length);
  for (; i < n; ++i)
    add_slots<1, kWeighted, G, T>(sums, y + i * numel, kWeighted ? weights + i : nullptr, numel, length);
}

// One function for each type, not one for each combination: they are most of what there is to compile.
using SumFunction = void (*)(double*, const void*, int64_t, const double*, int64_t, int64_t, int64_t);
#define PADDLE_ASGD_SUM(name, kWeighted, G, T)                                                               \
  PADDLE_ASGD_CLONES void name(double* sums, const void* y, int64_t begin, const double* weights, int64_t n, \
                               int64_t numel, int64_t length) {                                              \
    sum_history<kWeighted, G, T>(sums, static_cast<const G*>(y) + begin, weights, n, numel, length);         \
  }
PADDLE_ASGD_SUM(sum_float32, false, float, float)
PADDLE_ASGD_SUM(sum_float64, false, double, double)
PADDLE_ASGD_SUM(sum_float16, false, Float16, float)
PADDLE_ASGD_SUM(sum_bfloat16, false, BFloat16, float)
PADDLE_ASGD_SUM(sum_float32_weighted, true, float, float)
PADDLE_ASGD_SUM(sum_float64_weighted, true, double, double)
PADDLE_ASGD_SUM(sum_float16_weighted, true, Float16, float)
PADDLE_ASGD_SUM(sum_bfloat16_weighted, true, BFloat16, float)
#undef PADDLE_ASGD_SUM
// A type that is added to DType must be added here at the same position.
constexpr SumFunction kSum[][4] = {
    {sum_float32, sum_float64, sum_float16, sum_bfloat16},
    {sum_float32_weighted, sum_float64_weighted, sum_float16_weighted, sum_bfloat16_weighted}};  // by DType

// The sums of at most one unit, anew. A theta has moved x already: by d and y_i as they were.
template <typename P, typename G, typename T, bool kMaster, bool kTheta>
PADDLE_ASGD_INLINE void refresh_unit(const Typed<P, G, T>& t, const Gradient<G>& gradient, Coefficients<T> c,
                                     Range fresh, SumFunction sum, int64_t n, const double* weights) {
  const int64_t begin = fresh.begin, length = fresh.end - fresh.begin;
  G room[kRefreshUnit];
  const G* grad = gradient.stretch(begin, length, room);
  // First, for the sum is that of the history as this step leaves it.
  std::copy(grad, grad + length, t.y_i + begin);
  double sums[kRefreshUnit] = {};
  sum(sums, t.y, begin, weights, n, t.numel, length);
  T* d = t.d + begin;
  for (int64_t j = 0; j < length; ++j) d[j] = static_cast<T>(sums[j]);
  if (kTheta) return;
  T wide[kRefreshUnit];
  T* x = widen_weights<kMaster>(t, begin, length, wide);
  for (int64_t j = 0; j < length; ++j) x[j] = descend<T>(x[j], d[j], c);
  round_weights(t, begin, length, x);
}

template <typename P, typename G, typename T, bool kMaster, bool kTheta>
PADDLE_ASGD_INLINE void update_all(const Typed<P, G, T>& t, const Gradient<G>& gradient, Coefficients<T> c,
                                   const Refresh& refresh, SumFunction sum, int64_t n, const double* weights) {
  // One walk through the tensor: what a theta has just updated is still in the cache when it is recomputed.
  int64_t begin = 0;
  for (int64_t span = refresh.first; span < refresh.last; ++span) {
    const Range fresh = refreshed_in(refresh, span, t.numel);
    // The direction of SAG takes d as it will be, and so leaves the fresh elements to refresh_unit().
    update_range<P, G, T, kMaster, kTheta>(t, gradient, c, Range{begin, kTheta ? fresh.end : fresh.begin});
    if (fresh.begin < fresh.end) refresh_unit<P, G, T, kMaster, kTheta>(t, gradient, c, fresh, sum, n, weights);
    begin = fresh.end;
  }
  update_range<P, G, T, kMaster, kTheta>(t, gradient, c, Range{begin, t.numel});
}

template <typename P, typename G, typename T, bool kMaster>
PADDLE_ASGD_INLINE void step_tensor(const TensorArgs& t, const Visit& visit, double seen, const StepArgs& step) {
  const int64_t n = step.batch_num;
  const double* weights = step.batch_weights;
  const Coefficients<T> c = coefficients_of<T>(step, visit, seen);
  const Refresh refresh = refresh_of(*t.m, n, t.numel);
  const Typed<P, G, T> tensor = typed<P, G, T>(t, visit.slot);
  const Gradient<G> gradient = gradient_of<G>(t, step);
  const SumFunction sum = kSum[weights != nullptr][static_cast<int>(t.grad_dtype)];
  if (step.has_theta) {
    update_all<P, G, T, kMaster, true>(tensor, gradient, c, refresh, sum, n, weights);
  } else {
    update_all<P, G, T, kMaster, false>(tensor, gradient, c, refresh, sum, n, weights);
  }
  // Last: the slot, the divisor and the refresh are those of the clock before the step.
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

// Whether there is a theta or weights is asked within: they would double the functions to compile, twice.
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

// The divisors of one step. Weights that have not all been seen are a sum over the slots, and nearly always the clocks
// of neighbouring tensors are alike.
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

// ---- The watch -----------------------------------------------------------------------------------------------------

// A sum for every element of a run, so that the loop over them is vector code.
struct Sampled {
  double replaced[kWatchRun];
  double centred[kWatchRun];
  int64_t count;
};

template <typename G, typename T>
PADDLE_ASGD_INLINE void sample_run(const TensorArgs& t, const Visit& visit, double weight_seen, int64_t begin,
                                   const StepArgs& step, Sampled* sampled) {
  const G* y_i = static_cast<const G*>(t.y) + visit.slot * t.numel + begin;
  // d as the step finds it: the mean of what was known before this gradient.
  const T* d = static_cast<const T*>(t.d) + begin;
  // A product with the reciprocal, as on the GPU: a division for each element would give other bits.
  const T share = static_cast<T>(1 / weight_seen);
  const int64_t length = std::min(kWatchRun, t.numel - begin);
  G room[kWatchRun];
  const G* grad = gradient_of<G>(t, step).stretch(begin, length, room);
  for (int64_t j = 0; j < length; ++j) {
    const Squares added = squares<T>(widen(grad[j]), widen(y_i[j]), d[j], share);
    sampled->replaced[j] += added.replaced;
    sampled->centred[j] += added.centred;
  }
  sampled->count += length;
}

#define PADDLE_ASGD_SAMPLE(name, G, T)                                                                     \
  PADDLE_ASGD_CLONES void name(const TensorArgs& t, const Visit& visit, double weight_seen, int64_t begin, \
                               const StepArgs& step, Sampled* sampled) {                                   \
    sample_run<G, T>(t, visit, weight_seen, begin, step, sampled);                                         \
  }
PADDLE_ASGD_SAMPLE(sample_float32, float, float)
PADDLE_ASGD_SAMPLE(sample_float64, double, double)
PADDLE_ASGD_SAMPLE(sample_float16, Float16, float)
PADDLE_ASGD_SAMPLE(sample_bfloat16, BFloat16, float)
#undef PADDLE_ASGD_SAMPLE

using SampleFunction = void (*)(const TensorArgs&, const Visit&, double, int64_t, const StepArgs&, Sampled*);
// Any gradient dtype can come here, whatever the parameter's: the watch reads no parameter.
constexpr SampleFunction kSample[] = {sample_float32, sample_float64, sample_float16, sample_bfloat16};  // by DType

int64_t windows_of(const TensorArgs& t) { return (t.numel + kWatchWindow - 1) / kWatchWindow; }

// Before the step changes what is compared.
void watch_slots(const StepArgs& step) {
  int64_t windows = 0;
  for (int64_t i = 0; i < step.count; ++i) windows += windows_of(step.tensors[i]);
  const int64_t stride = watch_stride(windows);
  Sampled sampled = {};
  Divisors divisors;
  // The number of windows until the next that is sampled, across the tensors.
  int64_t next = slot_of_step(*step.tensors[0].m, stride);
  for (int64_t i = 0; i < step.count; ++i) {
    const TensorArgs& t = step.tensors[i];
    const int64_t count = windows_of(t);
    if (next < count) {
      const Visit visit = visit_of(t, step);
      const double seen = divisors.of(visit, t, step);
      for (; next < count; next += stride) {
        if (!visit.seen_before) continue;
        kSample[static_cast<int>(t.grad_dtype)](t, visit, seen, watch_begin(next, *t.m, t.numel), step, &sampled);
      }
    }
    next -= count;
  }
  // In this order, so that the sums of a run on the CPU are the same each time.
  for (int64_t j = 0; j < kWatchRun; ++j) {
    step.watch[kReplaced] += sampled.replaced[j];
    step.watch[kCentred] += sampled.centred[j];
  }
  step.watch[kSampled] += static_cast<double>(sampled.count);
}

// ---- The norm ------------------------------------------------------------------------------------------------------

template <typename P, typename T>
double sum_of_squares(const TensorArgs& t, double weight_decay, double weight_seen) {
  // In double: the squares of many small numbers, some of which float32 would lose beside the others.
  const T* d = static_cast<const T*>(t.d);
  double sum = 0;
  for (int64_t e = 0; e < t.numel; ++e) {
    const T x = t.master == nullptr ? widen(static_cast<const P*>(t.param)[e]) : static_cast<const T*>(t.master)[e];
    const double known = known_gradient<T>(x, d[e], weight_decay, weight_seen);
    sum += known * known;
  }
  return sum;
}

using NormFunction = double (*)(const TensorArgs&, double, double);
constexpr NormFunction kNorm[] = {sum_of_squares<float, float>, sum_of_squares<double, double>,
                                  sum_of_squares<Float16, float>, sum_of_squares<BFloat16, float>};  // by DType

}  // namespace

void asgd_cpu(const StepArgs& step) {
  // Before anything is written: such a step leaves all tensors, their clocks and the watch as they were.
  if (step.found_inf != nullptr && *step.found_inf) return;
  if (step.batch_index.given && !in_range(load(step.batch_index), step.batch_num)) {
    if (step.watch != nullptr) refuse_index(step.watch, load(step.batch_index));
    return;
  }
  // Before the loop below replaces what is compared.
  if (step.watch != nullptr && step.count > 0) watch_slots(step);
  Divisors divisors;
  for (int64_t i = 0; i < step.count; ++i) {
    const TensorArgs& t = step.tensors[i];
    const Visit visit = visit_of(t, step);
    choose(t)(t, visit, divisors.of(visit, t, step), step);
  }
  if (step.watch != nullptr) close_step(step.watch, step.batch_num);
}

void asgd_norm_cpu(const StepArgs& step, double* sum) {
  for (int64_t i = 0; i < step.count; ++i) {
    const TensorArgs& t = step.tensors[i];
    const double known = weight_known(t.m, step.batch_index.given, step.batch_num, step.batch_weights);
    if (known == 0) continue;  // no gradient has ever reached it
    *sum += kNorm[static_cast<int>(t.param_dtype)](t, load(step.weight_decay), known);
  }
}

}  // namespace paddle_asgd
