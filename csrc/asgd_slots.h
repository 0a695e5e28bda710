// SPDX-License-Identifier: Apache-2.0
// Which slot of the history a step replaces, which slots hold a gradient, and what they weigh, for host and device.
// Must not touch an element. While batches come in a fixed cycle, a parameter's clock m is one number, the steps taken:
// slot m % n is next, and the first min(m, n) hold a gradient. With a batch index m[0] is the steps taken, m[1] the
// number of distinct slots seen, and m[2], ... have one bit for every slot, set once it has been seen.
#pragma once

#include <cstdint>

#include "platform.h"

namespace paddle_asgd {

constexpr int64_t kBitsOfWord = 64;

// With a batch index. It divides first, because n + 63 might overflow.
PADDLE_ASGD_HOST_DEVICE int64_t clock_length(int64_t n) { return 2 + n / kBitsOfWord + (n % kBitsOfWord != 0); }

// Unsigned, so that a damaged counter cannot index outside of the history.
PADDLE_ASGD_HOST_DEVICE int64_t slot_of_step(int64_t m, int64_t n) {
  return static_cast<int64_t>(static_cast<uint64_t>(m) % static_cast<uint64_t>(n));
}

// Unsigned, because a damaged counter may be the largest number, and a signed overflow is undefined.
PADDLE_ASGD_HOST_DEVICE int64_t next_step(int64_t m) { return static_cast<int64_t>(static_cast<uint64_t>(m) + 1); }

PADDLE_ASGD_HOST_DEVICE bool in_range(int64_t slot, int64_t n) { return slot >= 0 && slot < n; }

struct Visit {  // what one step finds in one parameter's clock
  int64_t slot;
  bool seen_before;
  int64_t seen;  // distinct slots, this one included
};

// A damaged count passes for a full pass, so that nothing is divided by zero.
PADDLE_ASGD_HOST_DEVICE int64_t sound_count(int64_t seen, int64_t n) { return seen >= 1 && seen <= n ? seen : n; }

PADDLE_ASGD_HOST_DEVICE Visit cyclic_visit(int64_t m, int64_t n) {
  const bool first_pass = m >= 0 && m < n;
  return Visit{slot_of_step(m, n), !first_pass, first_pass ? m + 1 : n};
}

PADDLE_ASGD_HOST_DEVICE uint64_t bit_of(int64_t slot) { return uint64_t{1} << (slot % kBitsOfWord); }

PADDLE_ASGD_HOST_DEVICE bool has_seen(const int64_t* m, int64_t slot) {
  return (static_cast<uint64_t>(m[2 + slot / kBitsOfWord]) & bit_of(slot)) != 0;
}

PADDLE_ASGD_HOST_DEVICE Visit indexed_visit(const int64_t* m, int64_t slot, int64_t n) {
  const bool before = has_seen(m, slot);
  return Visit{slot, before, sound_count(before ? m[1] : next_step(m[1]), n)};
}

// What the `seen` slots weigh together; `slot` is one of them, marked already or not (-1: no such slot). Weights have
// the mean 1, so that all of them weigh n.
PADDLE_ASGD_HOST_DEVICE double weight_of(int64_t seen, int64_t slot, const int64_t* m, bool indexed, int64_t n,
                                         const double* weights) {
  if (weights == nullptr || seen == n) return static_cast<double>(seen);
  double sum = 0;
  // The order of the slots, not that in which they were seen, so that the same slots always give the same bits.
  for (int64_t i = 0; i < n; ++i) {
    if (i == slot || (indexed ? has_seen(m, i) : i < seen)) sum += weights[i];
  }
  return sum;
}

PADDLE_ASGD_HOST_DEVICE double weight_seen(const Visit& visit, const int64_t* m, bool indexed, int64_t n,
                                           const double* weights) {
  return weight_of(visit.seen, visit.slot, m, indexed, n, weights);
}

// The divisor of d between two steps is 0 before the first.
PADDLE_ASGD_HOST_DEVICE double weight_known(const int64_t* m, bool indexed, int64_t n, const double* weights) {
  const int64_t seen = indexed ? m[1] : m[0];
  return seen == 0 ? 0 : weight_of(sound_count(seen, n), -1, m, indexed, n, weights);
}

PADDLE_ASGD_HOST_DEVICE void advance(int64_t* m, const Visit& visit, bool indexed) {
  m[0] = next_step(m[0]);
  if (!indexed || visit.seen_before) return;
  m[1] = visit.seen;
  int64_t& word = m[2 + visit.slot / kBitsOfWord];
  word = static_cast<int64_t>(static_cast<uint64_t>(word) | bit_of(visit.slot));
}

}  // namespace paddle_asgd
