// SPDX-License-Identifier: Apache-2.0
// asgd_refresh.h on its own: which elements are recomputed, and when. Must not run a kernel.
#include <algorithm>
#include <initializer_list>
#include <vector>

#include "asgd_refresh.h"
#include "tensors.h"

namespace native_test {
namespace {

using paddle_asgd::kRefreshPasses;
using paddle_asgd::kRefreshSpan;
using paddle_asgd::kRefreshUnit;
using paddle_asgd::kUnitsOfSpan;
using paddle_asgd::Range;
using paddle_asgd::Refresh;
using paddle_asgd::refresh_of;
using paddle_asgd::refreshed_in;

constexpr int64_t kManyN[] = {1, 2, 3, 7, 100, 1000003, int64_t{1} << 31};

int64_t spans_of(int64_t numel) { return (numel + kRefreshSpan - 1) / kRefreshSpan; }

// Within the tensor, at most one unit of a span, and borders that the kernels' vectors cannot cross.
void check_range(const Refresh& refresh, int64_t span, int64_t numel) {
  const Range range = refreshed_in(refresh, span, numel);
  CHECK(0 <= range.begin && range.begin <= range.end && range.end <= numel, "numel %ld, span %ld: %ld to %ld", numel,
        span, range.begin, range.end);
  CHECK(range.end - range.begin <= kRefreshUnit, "numel %ld, span %ld: %ld to %ld", numel, span, range.begin,
        range.end);
  CHECK(range.begin == range.end || range.begin / kRefreshSpan == span, "numel %ld, span %ld: %ld to %ld", numel, span,
        range.begin, range.end);
  CHECK(range.begin % 16 == 0 || range.begin == numel, "numel %ld: begins at %ld", numel, range.begin);
  CHECK(range.end % 16 == 0 || range.end == numel, "numel %ld: ends at %ld", numel, range.end);
}

void check_bounds(int64_t m, int64_t n, int64_t numel) {
  const Refresh refresh = refresh_of(m, n, numel);
  const int64_t spans = spans_of(numel);
  CHECK(0 <= refresh.first && refresh.first <= refresh.last && refresh.last <= spans && refresh.unit >= 0 &&
            refresh.unit < kUnitsOfSpan,
        "m %ld n %ld numel %ld: unit %ld of %ld to %ld", m, n, numel, refresh.unit, refresh.first, refresh.last);
  for (const int64_t span : {int64_t{0}, refresh.first - 1, refresh.first, refresh.last - 1, refresh.last, spans - 1}) {
    if (span >= 0 && span < spans) check_range(refresh, span, numel);
  }
}

// A step goes on where the one before it ended, or begins the next round, with the next unit.
void check_step(int64_t m, int64_t n, int64_t numel) {
  check_bounds(m, n, numel);
  const int64_t spans = spans_of(numel), round = kRefreshPasses / kUnitsOfSpan * n;
  const Refresh now = refresh_of(m, n, numel), next = refresh_of(m + 1, n, numel),
                later = refresh_of(m + round, n, numel);
  const bool goes_on = next.unit == now.unit && next.first == now.last;
  const bool begins = next.unit == (now.unit + 1) % kUnitsOfSpan && now.last == spans && next.first == 0;
  CHECK(goes_on || begins, "m %ld n %ld numel %ld: to %ld, then from %ld", m, n, numel, now.last, next.first);
  CHECK(later.first == now.first && later.last == now.last && later.unit == (now.unit + 1) % kUnitsOfSpan,
        "m %ld n %ld numel %ld: from %ld, a round later from %ld", m, n, numel, now.first, later.first);
  // Evenly: no step does more than its share, rounded up.
  CHECK(now.last - now.first <= (spans + round - 1) / round, "m %ld n %ld numel %ld: %ld spans", m, n, numel,
        now.last - now.first);
}

void check_steps() {
  for (const int64_t n : kManyN) {
    const int64_t steps = kRefreshPasses * n;
    for (const int64_t numel :
         {int64_t{1}, int64_t{63}, int64_t{1024}, int64_t{4097}, int64_t{8193}, n * kRefreshSpan - 1, n * kRefreshSpan,
          n * kRefreshSpan + 1, steps * kRefreshSpan * 3 + 1, int64_t{1} << 40}) {
      for (int64_t m = 0; m < steps && m < 3000; ++m) {
        check_step(m, n, numel);
        check_step(steps - 1 - m, n, numel);
        check_step(steps / 2 + m, n, numel);
        check_step(steps * 1000003 + m, n, numel);
      }
      for (const int64_t m : kDamaged) check_bounds(m, n, numel);
    }
  }
}

// Counted: every element once in any kRefreshPasses * n steps, wherever they begin.
void check_every_element_once() {
  for (const int64_t n : {1, 2, 3, 7}) {
    const int64_t steps = kRefreshPasses * n;
    for (const int64_t numel : {0, 1, 257, 1024, 1025, 4096, 5121, 8193, 15 * 4096 + 1, 40 * 4096 - 1}) {
      for (const int64_t start : {int64_t{0}, int64_t{1}, steps / 2 + 1, steps - 1, 1000 * steps + 3}) {
        std::vector<int> times(numel);
        for (int64_t m = start; m < start + steps; ++m) {
          const Refresh refresh = refresh_of(m, n, numel);
          for (int64_t span = 0; span < spans_of(numel); ++span) {
            const Range range = refreshed_in(refresh, span, numel);
            for (int64_t e = range.begin; e < range.end; ++e) ++times[e];
          }
        }
        const int64_t once = std::count(times.begin(), times.end(), 1);
        CHECK(once == numel, "n %ld, numel %ld, from %ld: %ld once", n, numel, start, once);
      }
    }
  }
}

void check_nothing() {
  const auto check = [](int64_t n) {
    const Refresh refresh = refresh_of(5, n, 0);
    CHECK(refresh.first == 0 && refresh.last == 0, "n %ld: %ld to %ld", n, refresh.first, refresh.last);
  };
  check(1);
  for (const int64_t n : kEndless) check(n);
}

// Small tensors, all of which one step recomputes: it must not be the same step for all sizes.
void check_small_tensors_spread() {
  const int64_t n = 100, steps = kRefreshPasses * n, sizes = 1000;
  for (int64_t m = 0; m < steps; ++m) {
    int64_t busy = 0;
    for (int64_t numel = 1; numel <= sizes; ++numel) {
      const Range range = refreshed_in(refresh_of(m, n, numel), 0, numel);
      busy += range.begin < range.end;
    }
    CHECK(busy <= 10, "m %ld: %ld of %ld tensors", m, busy, sizes);
  }
}

}  // namespace
}  // namespace native_test

int main() {
  using namespace native_test;
  check_steps();
  check_every_element_once();
  check_nothing();
  check_small_tensors_spread();
  return 0;
}
