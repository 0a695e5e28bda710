// SPDX-License-Identifier: Apache-2.0
// Which elements of the running sum d a step computes anew from the history; for host and device alike. Plain C++: must
// not include Paddle or CUDA, and must not touch an element.
//
// d gathers rounding errors and keeps a NaN for ever. So every step recomputes d as the sum of y for a few elements, in
// turn, and comes to all of them within kRefreshPasses passes over the batches. It reads n numbers for an element every
// kRefreshPasses * n steps, so the price does not grow with n: of the seven numbers that a step moves for every
// element, it reads one more for every kRefreshPasses-th.
//
// The elements lie in spans of four units, and a step recomputes one unit of some spans, the same in each. A span is
// what a block of threads updates on a GPU: no block ever recomputes more than one unit, and waits n loads for it.
#pragma once

#include <cstdint>

#include "platform.h"

namespace paddle_asgd {

constexpr int64_t kRefreshPasses = 8;
// Long enough to read a slot in runs, short enough for a unit's sums to stay in the first-level cache.
constexpr int64_t kRefreshUnit = 1024;
constexpr int64_t kUnitsOfSpan = 4;
constexpr int64_t kRefreshSpan = kUnitsOfSpan * kRefreshUnit;

struct Range {
  int64_t begin;
  int64_t end;
};

// The spans [first, last) of a step, and which unit of each is recomputed.
struct Refresh {
  int64_t first;
  int64_t last;
  int64_t unit;
};

// The first span whose turn comes at step `k` of a round of `steps`. Written without the product spans * k, which
// overflows.
PADDLE_ASGD_HOST_DEVICE int64_t first_refreshed(int64_t k, int64_t steps, int64_t spans) {
  if (spans >= steps) {
    const int64_t every = spans / steps, left = spans % steps;
    return k * every + (k < left ? k : left);
  }
  // Fewer spans than steps: one span every so many steps, rather than all of them in a burst.
  const int64_t stride = steps / spans, span = (k + stride - 1) / stride;
  return span < spans ? span : spans;
}

// Tensors of different sizes begin at different steps, for most are so small that one step recomputes all of a tensor:
// without this it would be the same step for all of them. It depends on nothing but the size, so that a resumed run
// and another device do the same. The multiplier is 2^64 / golden ratio.
PADDLE_ASGD_HOST_DEVICE uint64_t refresh_phase(int64_t numel) {
  return (static_cast<uint64_t>(numel) * 0x9e3779b97f4a7c15u) >> 32;
}

// What the step that finds `m` in the clock recomputes: one round over all spans for each unit of a span.
PADDLE_ASGD_HOST_DEVICE Refresh refresh_of(int64_t m, int64_t n, int64_t numel) {
  // The history of an empty tensor has no bytes, so nothing limits n, and the product below might overflow.
  if (numel == 0) return Refresh{0, 0, 0};
  const int64_t spans = (numel + kRefreshSpan - 1) / kRefreshSpan;
  const int64_t round = kRefreshPasses / kUnitsOfSpan * n;
  const uint64_t steps = static_cast<uint64_t>(kUnitsOfSpan * round);
  // The clock is reduced first: a damaged one and the phase, which has 32 bits, might wrap.
  const int64_t k = static_cast<int64_t>((static_cast<uint64_t>(m) % steps + refresh_phase(numel)) % steps);
  const int64_t step = k % round;
  return Refresh{first_refreshed(step, round, spans), first_refreshed(step + 1, round, spans), k / round};
}

// The elements of one span that are recomputed: none of them if it is not its turn, or if the last span ends before.
PADDLE_ASGD_HOST_DEVICE Range refreshed_in(const Refresh& refresh, int64_t span, int64_t numel) {
  if (span < refresh.first || span >= refresh.last) return Range{numel, numel};
  const int64_t begin = span * kRefreshSpan + refresh.unit * kRefreshUnit, end = begin + kRefreshUnit;
  return Range{begin < numel ? begin : numel, end < numel ? end : numel};
}

}  // namespace paddle_asgd
