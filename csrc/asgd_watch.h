// SPDX-License-Identifier: Apache-2.0
// The watch over the slots: whether a stored gradient tells more about the next one of its batch than the mean of all
// does. Sums over a sample of elements, for host and device alike. Plain C++: must not include Paddle or CUDA, and must
// not change anything that the step computes.
//
// The ratio of sum |g - y_i|^2 to sum |g - d / m|^2 over a pass is that of Defazio and Bottou, "On the Ineffectiveness
// of Variance Reduced Optimization for Deep Learning" (NeurIPS 2019). Towards 0: the slots are right. About 2: slots
// and batches have nothing to do with each other. The mean of |g - d / m|^2 is the gradients' spread. What follows from
// these numbers is decided in paddle_asgd/sag/watch.py; only the last passes are kept here, because the host may look
// late or seldom.
#pragma once

#include <cstdint>

#include "platform.h"

namespace paddle_asgd {

// How many whole passes are kept: the eight that the host judges, and the one before them, with whose spread theirs are
// compared.
constexpr int64_t kPassesKept = 9;

// What the watch keeps between steps: [kWatchSize] of double, so that one tensor holds it on any device.
enum WatchEntry {
  kReplaced,      // sum of |g - y_i|^2 in this pass; visits to slots never seen before do not count
  kCentred,       // sum of |g - d / m|^2, the same visits and elements
  kSampled,       // how many elements those are: in the first passes some visits do not count
  kSteps,         // steps taken in this pass
  kPasses,        // whole passes so far
  kRefusals,      // steps that a batch index out of range has kept from changing anything
  kRefusedIndex,  // the last such index
  kKept,  // [kPassesKept] rows of the first three, as whole passes left them; pass p, from 0, is in row p modulo
          // kPassesKept
  kWatchSize = kKept + 3 * kPassesKept
};

// Elements are sampled in runs, at most one in each window: a whole cache line of the narrowest dtype's neighbours, and
// never across the border of a window, which on a GPU is a block's.
constexpr int64_t kWatchRun = 16;
constexpr int64_t kWatchWindow = 4096;

// At most kWatchRuns windows are sampled in a step, in turn: the watch must not cost 2 % of it. That is 512 elements,
// of which a ratio is known to about 5 % after one step, and better after a pass.
constexpr int64_t kWatchRuns = 32;
PADDLE_ASGD_HOST_DEVICE int64_t watch_stride(int64_t windows) {
  return windows <= kWatchRuns ? 1 : (windows + kWatchRuns - 1) / kWatchRuns;
}

// Where the run of a window begins at step m: anywhere, in multiples of a run. The multiplier is 2^64 / golden ratio,
// which spreads successive numbers evenly.
PADDLE_ASGD_HOST_DEVICE int64_t watch_begin(int64_t window, int64_t m, int64_t numel) {
  const int64_t begin = window * kWatchWindow;
  const int64_t left = numel - begin < kWatchWindow ? numel - begin : kWatchWindow;
  const uint64_t runs = static_cast<uint64_t>((left + kWatchRun - 1) / kWatchRun);
  const uint64_t mixed = (static_cast<uint64_t>(m) + static_cast<uint64_t>(window)) * 0x9e3779b97f4a7c15u;
  return begin + static_cast<int64_t>((mixed >> 32) % runs) * kWatchRun;
}

// What one element adds to the two sums; `share` is 1 / m.
struct Squares {
  double replaced, centred;
};

template <typename T>
PADDLE_ASGD_HOST_DEVICE Squares squares(T g, T y_i, T d, T share) {
  const double replaced = static_cast<double>(g) - static_cast<double>(y_i);
  const double centred = static_cast<double>(g) - static_cast<double>(d * share);
  return Squares{replaced * replaced, centred * centred};
}

// Behind the last tensor of a step: a pass is n steps, whatever their order.
PADDLE_ASGD_HOST_DEVICE void close_step(double* watch, int64_t n) {
  watch[kSteps] += 1;
  if (watch[kSteps] < static_cast<double>(n)) return;
  double* row = watch + kKept + 3 * (static_cast<int64_t>(watch[kPasses]) % kPassesKept);
  for (int i = 0; i < 3; ++i) {
    row[i] = watch[kReplaced + i];
    watch[kReplaced + i] = 0;
  }
  watch[kPasses] += 1;
  watch[kSteps] = 0;
}

PADDLE_ASGD_HOST_DEVICE void refuse_index(double* watch, int64_t index) {
  watch[kRefusals] += 1;
  watch[kRefusedIndex] = static_cast<double>(index);
}

}  // namespace paddle_asgd
