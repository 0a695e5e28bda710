// SPDX-License-Identifier: Apache-2.0
// asgd_formula.h on its own: which coefficients, which elements are refreshed. Must not run a kernel.
#include <initializer_list>

#include "asgd_formula.h"
#include "check.h"

namespace {

using paddle_asgd::kRefreshPasses;
using paddle_asgd::Range;
using paddle_asgd::refresh_range;

constexpr int64_t kDamaged[] = {-1, -2, -1000003, INT64_MIN, INT64_MIN + 1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62};
constexpr int64_t kManyN[] = {1, 2, 3, 7, 100, 1000003, int64_t{1} << 31};

void check_refreshed_in_step(int64_t m, int64_t n, int64_t numel) {
  const Range range = refresh_range(m, n, numel);
  const Range next = refresh_range(m + 1, n, numel);
  const int64_t steps = kRefreshPasses * n, position = m % steps;
  CHECK(0 <= range.begin && range.begin <= range.end && range.end <= numel, "m %ld n %ld numel %ld: %ld to %ld", m, n,
        numel, range.begin, range.end);
  CHECK(position != 0 || range.begin == 0, "m %ld n %ld numel %ld: begins at %ld", m, n, numel, range.begin);
  const bool last = position == steps - 1;
  CHECK(range.end == (last ? numel : next.begin), "m %ld n %ld numel %ld: ends at %ld", m, n, numel, range.end);
  // The kernel's vectors must lie on one side of each border.
  CHECK(range.begin % 16 == 0 || range.begin == numel, "m %ld n %ld numel %ld: begins at %ld", m, n, numel,
        range.begin);
  CHECK(range.end % 16 == 0 || range.end == numel, "m %ld n %ld numel %ld: ends at %ld", m, n, numel, range.end);
}

// Each range begins where the one before it ends, the first at 0, the last ends at numel: all elements, once.
void check_refresh_covers() {
  for (const int64_t n : kManyN) {
    const int64_t steps = kRefreshPasses * n;
    for (const int64_t numel :
         {int64_t{0}, int64_t{1}, int64_t{63}, int64_t{64}, int64_t{65}, int64_t{257}, int64_t{8193}, steps * 64 - 1,
          steps * 64, steps * 64 + 1, steps * 64 * 3 + 1, int64_t{1} << 40}) {
      for (int64_t m = 0; m < steps && m < 3000; ++m) {
        check_refreshed_in_step(m, n, numel);
        check_refreshed_in_step(steps - 1 - m, n, numel);
        check_refreshed_in_step(steps / 2 + m, n, numel);
        check_refreshed_in_step(steps * 1000003 + m, n, numel);
      }
      for (const int64_t m : kDamaged) {
        const Range range = refresh_range(m, n, numel);
        CHECK(0 <= range.begin && range.begin <= range.end && range.end <= numel, "m %ld n %ld", m, n);
      }
    }
  }
}

// A history of an empty parameter has no bytes, so nothing limits its slots.
void check_refresh_of_nothing() {
  for (const int64_t n : {int64_t{1} << 40, int64_t{1} << 61, int64_t{1} << 62, INT64_MAX}) {
    const Range range = refresh_range(5, n, 0);
    CHECK(range.begin == 0 && range.end == 0, "n %ld: %ld to %ld", n, range.begin, range.end);
  }
}

template <typename T>
void check_coefficients() {
  // All are exact.
  const auto exact = paddle_asgd::coefficients<T>(0.75, 0.125, 0.375, 1.25, 3);
  CHECK(exact.weight == T(1.25) && exact.step == T(0.25) && exact.shrink == T(0.09375) && exact.change == T(0.28125),
        "%g %g %g %g", double(exact.weight), double(exact.step), double(exact.shrink), double(exact.change));
  // Divided and multiplied in double and rounded once, whatever T is.
  for (int i = 1; i < 100; ++i) {
    const double rate = 0.0137 * i, decay = 0.3 / i, theta = 0.7 / i, weight = 1.3 / i, seen = 0.1 + i;
    const auto c = paddle_asgd::coefficients<T>(rate, decay, theta, weight, seen);
    CHECK(c.weight == static_cast<T>(weight) && c.step == static_cast<T>(rate / seen), "rate %g", rate);
    CHECK(c.shrink == static_cast<T>(rate * decay) && c.change == static_cast<T>(rate * theta), "rate %g", rate);
  }
}

// The divisor and the decay in double, whatever T is.
void check_known_gradient() {
  CHECK(paddle_asgd::known_gradient<float>(2, 3, 0.25, 4) == 1.25, "worked by hand");
  const float third = 1 / 3.0f;
  CHECK(paddle_asgd::known_gradient<float>(third, third, 0.1, 3) == double(third) / 3 + 0.1 * double(third), "rounded");
}

}  // namespace

int main() {
  check_coefficients<float>();
  check_coefficients<double>();
  check_known_gradient();
  check_refresh_covers();
  check_refresh_of_nothing();
  return 0;
}
