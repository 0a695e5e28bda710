// asgd_formula.h on its own: which slot, which coefficients, which elements are refreshed. Must not run a kernel.
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

void check_slots() {
  for (const int64_t n : kManyN) {
    for (int64_t m = 0; m < 20; ++m) CHECK(paddle_asgd::slot_of_step(m, n) == m % n, "m %ld n %ld", m, n);
    for (const int64_t m : kDamaged) {
      const int64_t slot = paddle_asgd::slot_of_step(m, n);
      CHECK(0 <= slot && slot < n, "m %ld n %ld: %ld", m, n, slot);
    }
  }
}

template <typename T>
void check_coefficients() {
  // 0.75 / 3 and 0.75 * 0.125 are exact; n = 3 has all three cases: first pass, its last step, later.
  const T kExpected[] = {T(0.75), T(0.375), T(0.25), T(0.25), T(0.25)};
  for (int64_t m = 0; m < 5; ++m) {
    const auto c = paddle_asgd::coefficients<T>(0.75, 0.125, m, 3);
    CHECK(c.step == kExpected[m] && c.shrink == T(0.09375), "m %ld: %g %g", m, double(c.step), double(c.shrink));
  }
  for (const int64_t m : kDamaged) {
    const auto c = paddle_asgd::coefficients<T>(0.75, 0.125, m, 3);
    CHECK(c.step == T(0.25) && c.shrink == T(0.09375), "m %ld: %g %g", m, double(c.step), double(c.shrink));
  }
  // Divided and multiplied in double and rounded once, whatever T is.
  for (int i = 1; i < 100; ++i) {
    const double rate = 0.0137 * i, decay = 0.3 / i;
    const auto c = paddle_asgd::coefficients<T>(rate, decay, 8, 7);
    CHECK(c.step == static_cast<T>(rate / 7) && c.shrink == static_cast<T>(rate * decay), "rate %g", rate);
  }
}

}  // namespace

int main() {
  check_slots();
  check_coefficients<float>();
  check_coefficients<double>();
  check_refresh_covers();
  check_refresh_of_nothing();
  return 0;
}
