// The stochastic average gradient update of one element, for host and device alike, and nothing else: no loop, no
// launch, no tensor. Plain C++: must not include Paddle or CUDA. Compile with contraction off (g++ -ffp-contract=off,
// nvcc -fmad=false), so that every device gives the same bits.
//
// The letters are those of Schmidt, Le Roux and Bach, "Minimizing Finite Sums with the Stochastic Average Gradient"
// (Mathematical Programming 162, 2017), Algorithm 1:
//   x  the parameter          g    the gradient of this step's batch
//   n  the number of batches  y_i  the last gradient seen of batch i
//   d  the sum of all y_i     m    the steps taken before this one
#pragma once

#include "half.h"

namespace paddle_asgd {

// The slot of this step's batch. Unsigned, so that a damaged counter cannot index outside of the history.
PADDLE_ASGD_HOST_DEVICE int64_t slot_of_step(int64_t m, int64_t n) {
  return static_cast<int64_t>(static_cast<uint64_t>(m) % static_cast<uint64_t>(n));
}

// m <- m + 1, without overflow whatever m is.
PADDLE_ASGD_HOST_DEVICE int64_t next_step(int64_t m) { return static_cast<int64_t>(static_cast<uint64_t>(m) + 1); }

// d <- d - y_i + g. In this order: with one batch, where d equals y_i, the result is g exactly; and
// what rounding adds to a sum of many numbers of one sign when g enters, it takes back when g leaves.
template <typename T>
PADDLE_ASGD_HOST_DEVICE T replace_gradient(T d, T y_i, T g) {
  return (d - y_i) + g;
}

// What one step multiplies with, the same for every element: computed once, in double.
template <typename T>
struct Coefficients {
  T step;    // learning_rate / (number of batches seen so far)
  T shrink;  // learning_rate * weight_decay
};

template <typename T>
PADDLE_ASGD_HOST_DEVICE Coefficients<T> coefficients(double learning_rate, double weight_decay, int64_t m, int64_t n) {
  // A damaged counter (negative) counts as a full pass: no division by zero.
  const int64_t seen = m >= 0 && m < n ? m + 1 : n;
  return Coefficients<T>{static_cast<T>(learning_rate / static_cast<double>(seen)),
                         static_cast<T>(learning_rate * weight_decay)};
}

// x <- x - learning_rate * (d / min(m + 1, n) + weight_decay * x)
template <typename T>
PADDLE_ASGD_HOST_DEVICE T descend(T x, T d, Coefficients<T> c) {
  return x - (c.step * d + c.shrink * x);
}

// The running sum d gathers rounding errors and keeps a NaN for ever. So every step recomputes d as the sum of y for a
// few elements, in turn, and comes to all of them within kRefreshPasses passes over the batches. It reads n numbers for
// an element every kRefreshPasses * n steps, so the price does not grow with n: of the seven numbers that a step moves
// for every element, it reads one more for every kRefreshPasses-th.
constexpr int64_t kRefreshPasses = 8;
// Elements are taken in units: long enough to read a slot in runs, short enough for a unit's sums to stay in the
// first-level cache.
constexpr int64_t kRefreshUnit = 1024;

struct Range {
  int64_t begin;
  int64_t end;
};

// The first unit that step `k` of a window of `steps` recomputes. Written without the product units * k, which
// overflows.
PADDLE_ASGD_HOST_DEVICE int64_t first_refreshed(int64_t k, int64_t steps, int64_t units) {
  if (units >= steps) {
    const int64_t every = units / steps, left = units % steps;
    return k * every + (k < left ? k : left);
  }
  // Fewer units than steps: one unit every so many steps, rather than all of them in a burst.
  const int64_t stride = steps / units, unit = (k + stride - 1) / stride;
  return unit < units ? unit : units;
}

// The elements whose sum this step recomputes. The next step's range begins where this one ends.
PADDLE_ASGD_HOST_DEVICE Range refresh_range(int64_t m, int64_t n, int64_t numel) {
  if (numel == 0) return Range{0, 0};
  const int64_t units = (numel + kRefreshUnit - 1) / kRefreshUnit;
  const int64_t steps = kRefreshPasses * n, k = slot_of_step(m, steps);
  const int64_t begin = first_refreshed(k, steps, units) * kRefreshUnit;
  const int64_t end = first_refreshed(k + 1, steps, units) * kRefreshUnit;
  return Range{begin < numel ? begin : numel, end < numel ? end : numel};
}

}  // namespace paddle_asgd
