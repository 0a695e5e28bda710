// SPDX-License-Identifier: Apache-2.0
// average_power.h beside powl(), whose 64 bits of mantissa are enough to judge 53. Must not run a kernel.
#include <cmath>
#include <limits>

#include "average_power.h"
#include "check.h"
#include "tensors.h"

namespace {

using paddle_asgd::power;

// The distance from the right result, in units of its last place.
double error_of(double base, double exponent) {
  const long double right = powl(base, exponent);
  const double rounded = static_cast<double>(right);
  const long double unit = std::nextafter(rounded, std::numeric_limits<double>::infinity()) - rounded;
  return static_cast<double>(std::fabs((power(base, exponent) - right) / unit));
}

void check_accuracy() {
  native_test::Random random(3);
  const double exponents[] = {0.75, 0.5, 2.0 / 3, 0.9, 1.25, 1e-3, 1e-12, 2, 3.5};
  double worst = 0;
  for (int64_t i = 0; i < 400000; ++i) {
    const double fraction = std::ldexp(static_cast<double>(random.next() >> 11), -53);
    // Close to 1, where a schedule spends its first steps, and up to 2^200.
    const double base = i % 2 == 0 ? 1 + std::ldexp(fraction, -static_cast<int>(random.next() % 50))
                                   : std::ldexp(1 + fraction, static_cast<int>(random.next() % 200));
    for (const double exponent : exponents) {
      const double error = error_of(base, exponent);
      CHECK(error < 0.7, "power(%a, %a) is %a, off by %g units", base, exponent, power(base, exponent), error);
      worst = std::fmax(worst, error);
    }
  }
  // As torch's schedule asks for it.
  for (int64_t step = 1; step < 2000000; step += 7) {
    const double error = error_of(1 + 1e-4 * 0.01 * static_cast<double>(step), 0.75);
    CHECK(error < 0.7, "step %ld: off by %g units", static_cast<long>(step), error);
  }
  CHECK(worst > 0.5, "%g: nothing rounds that well, so this measured nothing", worst);
}

void check_exact_cases() {
  const double infinity = std::numeric_limits<double>::infinity();
  CHECK(power(1, 1e300) == 1 && power(7, 0) == 1 && power(infinity, 0) == 1, "1");
  CHECK(power(3.7, 1) == 3.7 && power(16, 0.75) == 8 && power(1024, 0.5) == 32, "exact");
  CHECK(power(infinity, 0.5) == infinity && power(2, 1024) == infinity && power(2, 1e300) == infinity, "overflow");
  CHECK(power(2, 1023) == std::ldexp(1.0, 1023) && power(2, 1023.5) > std::ldexp(1.0, 1023), "the largest");
  CHECK(std::isnan(power(std::nan(""), 2)) && std::isnan(power(0.5, 2)) && std::isnan(power(2, std::nan(""))), "NaN");
}

}  // namespace

int main() {
  check_accuracy();
  check_exact_cases();
  return 0;
}
