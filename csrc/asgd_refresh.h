// SPDX-License-Identifier: Apache-2.0
// Which elements of d a step computes anew from the history, for host and device. Must not touch an element. Without it
// d would gather rounding errors and keep a NaN for ever. A step recomputes a few elements, in turn, and comes to all
// of them in kRefreshPasses passes. A span of four units is what one block of threads updates on a GPU; a step
// recomputes one unit of some spans, because a block that recomputed more would keep the whole launch waiting.
#pragma once

#include <cstdint>

#include "platform.h"

namespace paddle_asgd {

constexpr int64_t kRefreshPasses = 8;
// A unit is long enough to read a slot in runs, and so short that its sums stay in the first-level cache.
constexpr int64_t kRefreshUnit = 1024;
constexpr int64_t kUnitsOfSpan = 4;
constexpr int64_t kRefreshSpan = kUnitsOfSpan * kRefreshUnit;

struct Range {
  int64_t begin;
  int64_t end;
};

struct Refresh {
  int64_t first;  // the spans [first, last) of a step
  int64_t last;
  int64_t unit;  // the one of each span that is recomputed
};

// The first span whose turn comes at step `k` of a round of `steps`. The product spans * k would overflow.
PADDLE_ASGD_HOST_DEVICE int64_t first_refreshed(int64_t k, int64_t steps, int64_t spans) {
  if (spans >= steps) {
    const int64_t every = spans / steps, left = spans % steps;
    return k * every + (k < left ? k : left);
  }
  // There are fewer spans than steps, so one comes every so many steps; a burst would make single steps slow.
  const int64_t stride = steps / spans, span = (k + stride - 1) / stride;
  return span < spans ? span : spans;
}

// Most tensors are so small that one step recomputes all of them; the phase makes it another step for each size. It
// depends on the size alone, so that a resumed run and another device do the same.
PADDLE_ASGD_HOST_DEVICE uint64_t refresh_phase(int64_t numel) {
  return (static_cast<uint64_t>(numel) * 0x9e3779b97f4a7c15u) >> 32;  // 2^64 / golden ratio
}

PADDLE_ASGD_HOST_DEVICE Refresh refresh_of(int64_t m, int64_t n, int64_t numel) {
  if (numel == 0) return Refresh{0, 0, 0};  // no memory limits n then, and the product below might overflow
  const int64_t spans = (numel + kRefreshSpan - 1) / kRefreshSpan;
  const int64_t round = kRefreshPasses / kUnitsOfSpan * n;
  const uint64_t steps = static_cast<uint64_t>(kUnitsOfSpan * round);
  // The clock is reduced first, because a damaged one and the phase might wrap together.
  const int64_t k = static_cast<int64_t>((static_cast<uint64_t>(m) % steps + refresh_phase(numel)) % steps);
  const int64_t step = k % round;
  return Refresh{first_refreshed(step, round, spans), first_refreshed(step + 1, round, spans), k / round};
}

PADDLE_ASGD_HOST_DEVICE Range refreshed_in(const Refresh& refresh, int64_t span, int64_t numel) {
  if (span < refresh.first || span >= refresh.last) return Range{numel, numel};  // it is not this span's turn
  const int64_t begin = span * kRefreshSpan + refresh.unit * kRefreshUnit, end = begin + kRefreshUnit;
  return Range{begin < numel ? begin : numel, end < numel ? end : numel};
}

}  // namespace paddle_asgd
