// SPDX-License-Identifier: Apache-2.0
// asgd_formula.h on its own: the coefficients of a step. Must not run a kernel.
#include "asgd_formula.h"
#include "check.h"

namespace {

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
  return 0;
}
