// SPDX-License-Identifier: Apache-2.0
// The watch on the GPU: a kernel that adds up the sample of one step (asgd_watch.h says which elements those are). Must
// not write to a tensor. asgd_step_cuda.cu launches it, because it must run between two launches of a step.
#pragma once

#include <cstdint>

#include "asgd_launch.h"
#include "asgd_step.h"
#include "asgd_watch.h"
#include "block_scale.h"

namespace paddle_asgd {
namespace {

static_assert(kChunk == kWatchWindow, "the watch counts blocks for windows");

// The stored gradient's element `e` of a slot.
template <typename G, typename T>
__device__ T stored_at(const TensorArgs& t, int64_t slot, int64_t e) {
  const int64_t at = slot * t.numel + e;
  if (t.history == History::kExact) return widen(static_cast<const G*>(t.y)[at]);
  const float scale = t.y_scale[slot * scale_blocks(t.numel) + e / kScaleBlock];
  return t.history == History::kInt16 ? from_stored<T>(static_cast<const int16_t*>(t.y)[at], scale)
                                      : from_stored<T>(static_cast<const int8_t*>(t.y)[at], scale);
}

// This is a launch of its own before step_tensors, because there it would cost every block its registers. One thread
// takes one run. The order of these sums differs from run to run, and no step depends on them.
template <typename G, typename T, int kBytes>
__global__ void watch_slots(const PADDLE_ASGD_GRID_CONSTANT AsgdLaunch<kBytes> launch) {
  const StepArgs& step = launch.step;
  if (!takes_step(step)) return;
  // The blocks of step_tensors are the windows of the watch, as asserted above, so first_block counts both.
  const int64_t windows = launch.first_block[launch.count], stride = watch_stride(windows);
  const int64_t first = slot_of_step(*launch.tensors[0].m, stride);
  const int64_t window = first + (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * stride;
  if (window >= windows) return;
  const int index = find_tensor(launch, static_cast<int32_t>(window));
  const TensorArgs& t = launch.tensors[index];
  const Visit visit = visit_of(t, step);
  // What a slot holds before its first visit is no gradient, and says nothing about the next one.
  if (!visit.seen_before) return;
  const int64_t begin = watch_begin(window - launch.first_block[index], *t.m, t.numel);
  const int64_t end = min(begin + kWatchRun, t.numel);
  const T share = static_cast<T>(1 / divisor(visit, t, step));
  double sum_replaced = 0, sum_centred = 0;
  for (int64_t e = begin; e < end; ++e) {
    const Squares added = squares<T>(widen(static_cast<const G*>(t.grad)[e]), stored_at<G, T>(t, visit.slot, e),
                                     static_cast<const T*>(t.d)[e], share);
    sum_replaced += added.replaced;
    sum_centred += added.centred;
  }
  // At most kWatchRuns threads of a launch come here: too few to pay for a reduction.
  atomicAdd(&step.watch[kReplaced], sum_replaced);
  atomicAdd(&step.watch[kCentred], sum_centred);
  atomicAdd(&step.watch[kSampled], static_cast<double>(end - begin));
}

}  // namespace
}  // namespace paddle_asgd
