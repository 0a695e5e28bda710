// SPDX-License-Identifier: Apache-2.0
// The watch on the CPU: adds up the sample of one step (asgd_watch.h says which elements those are). Must not write to
// a tensor.
#include <algorithm>

#include "asgd_cpu.h"
#include "asgd_gradient.h"
#include "asgd_history.h"
#include "asgd_watch.h"

namespace paddle_asgd {
namespace {

// A sum for every element of a run, so that the loop over them is vector code.
struct Sampled {
  double replaced[kWatchRun];
  double centred[kWatchRun];
  int64_t count;
};

// The stored gradient from `begin` on, put into `room` by the type of the arithmetic.
template <typename G, typename T>
PADDLE_ASGD_INLINE void stored_run(const TensorArgs& t, int64_t slot, int64_t begin, int64_t length, T* room) {
  if (t.history != History::kExact) {
    // A run lies within one block of scales, and so begins in its middle.
    const NarrowSlot<T> narrow = narrow_slot<T>(t, slot);
    return narrow.read(begin, length, room);
  }
  const G* y_i = static_cast<const G*>(t.y) + slot * t.numel + begin;
  for (int64_t j = 0; j < length; ++j) room[j] = widen(y_i[j]);
}

template <typename G, typename T>
PADDLE_ASGD_INLINE void sample_run(const TensorArgs& t, const Visit& visit, double weight_seen, int64_t begin,
                                   const StepArgs& step, Sampled* sampled) {
  // The step has not changed d yet, so d / m is the mean of what was known before this gradient.
  const T* d = static_cast<const T*>(t.d) + begin;
  // A product with the reciprocal, as on the GPU: a division for each element would give other bits.
  const T share = static_cast<T>(1 / weight_seen);
  const int64_t length = std::min(kWatchRun, t.numel - begin);
  G room[kWatchRun];
  T stored[kWatchRun];
  const G* grad = gradient_of<G>(t, step).stretch(begin, length, room);
  stored_run<G, T>(t, visit.slot, begin, length, stored);
  for (int64_t j = 0; j < length; ++j) {
    const Squares added = squares<T>(widen(grad[j]), stored[j], d[j], share);
    sampled->replaced[j] += added.replaced;
    sampled->centred[j] += added.centred;
  }
  sampled->count += length;
}

// A function template cannot be cloned, so each dtype of a gradient gets a function of its own.
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
// By the gradient's DType, whatever the parameter's is, because the watch reads no parameter.
constexpr SampleFunction kSample[] = {sample_float32, sample_float64, sample_float16, sample_bfloat16};

int64_t windows_of(const TensorArgs& t) { return (t.numel + kWatchWindow - 1) / kWatchWindow; }

}  // namespace

void watch_slots(const StepArgs& step) {
  // All tensors are counted before the first is sampled, because the stride depends on the whole step.
  int64_t windows = 0;
  for (int64_t i = 0; i < step.count; ++i) windows += windows_of(step.tensors[i]);
  const int64_t stride = watch_stride(windows);
  Sampled sampled = {};
  Divisors divisors;
  // The number of windows until the next one that is sampled. It is carried from one tensor to the next, so that small
  // tensors take their turns, too.
  int64_t next = slot_of_step(*step.tensors[0].m, stride);
  for (int64_t i = 0; i < step.count; ++i) {
    const TensorArgs& t = step.tensors[i];
    const int64_t count = windows_of(t);
    if (next < count) {
      const Visit visit = visit_of(t, step);
      const double seen = divisors.of(visit, t, step);
      for (; next < count; next += stride) {
        // What a slot holds before its first visit is no gradient, and says nothing about the next one.
        if (!visit.seen_before) continue;
        kSample[static_cast<int>(t.grad_dtype)](t, visit, seen, watch_begin(next, *t.m, t.numel), step, &sampled);
      }
    }
    next -= count;
  }
  // The order is fixed, so that the same run gives the same sums each time.
  for (int64_t j = 0; j < kWatchRun; ++j) {
    step.watch[kReplaced] += sampled.replaced[j];
    step.watch[kCentred] += sampled.centred[j];
  }
  step.watch[kSampled] += static_cast<double>(sampled.count);
}

}  // namespace paddle_asgd
