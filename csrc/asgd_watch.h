// SPDX-License-Identifier: Apache-2.0
// The watch over the slots, for host and device: sums over a sample of elements that tell whether a stored gradient
// says more about the next one of its batch than the mean of all does. Must not change anything that the step computes.
// The ratio of sum |g - y_i|^2 to sum |g - d / m|^2 over a pass (Defazio and Bottou, NeurIPS 2019) is near 0 where the
// slots are right, and about 2 where slots and batches have nothing to do with each other. paddle_asgd/sag/watch.py
// judges it.
#pragma once

#include <cstdint>

#include "platform.h"

namespace paddle_asgd {

constexpr int64_t kPassesKept = 9;  // the eight that the host judges, and one before them to compare with

// Kept between steps as doubles, so that one tensor holds all of it. Whole passes stay, because the host looks seldom.
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

// At most one run of elements is sampled in each window, never across its border, which on a GPU is a block's.
constexpr int64_t kWatchRun = 16;
constexpr int64_t kWatchWindow = 4096;

// No more windows than this are sampled in a step, in turn, because the watch must not cost 2 % of it. That is 512
// elements, of which a ratio is known to about 5 % after one step, and better after a pass.
constexpr int64_t kWatchRuns = 32;
PADDLE_ASGD_HOST_DEVICE int64_t watch_stride(int64_t windows) {
  return windows <= kWatchRuns ? 1 : (windows + kWatchRuns - 1) / kWatchRuns;
}

// Where the run of a window begins at step m. The multiplier, 2^64 / golden ratio, spreads successive steps evenly.
PADDLE_ASGD_HOST_DEVICE int64_t watch_begin(int64_t window, int64_t m, int64_t numel) {
  const int64_t begin = window * kWatchWindow;
  const int64_t left = numel - begin < kWatchWindow ? numel - begin : kWatchWindow;
  const uint64_t runs = static_cast<uint64_t>((left + kWatchRun - 1) / kWatchRun);
  const uint64_t mixed = (static_cast<uint64_t>(m) + static_cast<uint64_t>(window)) * 0x9e3779b97f4a7c15u;
  return begin + static_cast<int64_t>((mixed >> 32) % runs) * kWatchRun;
}

struct Squares {  // what one element adds to the two sums
  double replaced, centred;
};

template <typename T>
PADDLE_ASGD_HOST_DEVICE Squares squares(T g, T y_i, T d, T share) {
  const double replaced = static_cast<double>(g) - static_cast<double>(y_i);
  const double centred = static_cast<double>(g) - static_cast<double>(d * share);  // share is 1 / m
  return Squares{replaced * replaced, centred * centred};
}

// Called once a step, behind its last tensor: a pass is n steps, whatever the order of the batches.
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

// Whether there is anything to say after the last whole pass: its ratio exceeds the threshold, or an index was refused.
inline bool wants_a_look(const double* watch, double threshold) {
  if (watch[kRefusals] > 0) return true;
  if (watch[kPasses] == 0) return false;
  const double* row = watch + kKept + 3 * ((static_cast<int64_t>(watch[kPasses]) - 1) % kPassesKept);
  return row[kReplaced] > threshold * row[kCentred];
}

PADDLE_ASGD_HOST_DEVICE void refuse_index(double* watch, int64_t index) {
  watch[kRefusals] += 1;
  watch[kRefusedIndex] = static_cast<double>(index);
}

}  // namespace paddle_asgd
