// SPDX-License-Identifier: Apache-2.0
// A power that has the same bits on host and device: the libraries' own pow() differ in the last place. Plain C++ of
// IEEE additions, products and quotients: must not include Paddle or CUDA, nor call a mathematical library. Compile
// with contraction off, as average_formula.h says.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace paddle_asgd {

// The sum of both, which is not rounded; `low` is at most a few units in the last place of `high`.
struct TwoDoubles {
  double high, low;
};

// a + b exactly (Knuth).
PADDLE_ASGD_HOST_DEVICE TwoDoubles exact_sum(double a, double b) {
  const double sum = a + b, part = sum - a;
  return TwoDoubles{sum, (a - (sum - part)) + (b - part)};
}

// a * b exactly (Dekker), without a fused product, which not every processor has. Both must stay below 2^990.
PADDLE_ASGD_HOST_DEVICE TwoDoubles exact_product(double a, double b) {
  const double split = 134217729.0;  // 2^27 + 1
  const double a_split = split * a, b_split = split * b;
  const double a_high = a_split - (a_split - a), b_high = b_split - (b_split - b);
  const double a_low = a - a_high, b_low = b - b_high, product = a * b;
  return TwoDoubles{product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low};
}

PADDLE_ASGD_HOST_DEVICE TwoDoubles product(TwoDoubles a, TwoDoubles b) {
  const TwoDoubles exact = exact_product(a.high, b.high);
  return exact_sum(exact.high, exact.low + (a.high * b.low + a.low * b.high));
}

// The first 42 bits of ln 2, of which 1,024 times are exact, and the rest.
constexpr double kLn2High = 0x1.62e42fefa3800p-1, kLn2Low = 0x1.ef35793c76730p-45;

// ln(base) for a normal base of at least 1, with a relative error below 2^-63.
PADDLE_ASGD_HOST_DEVICE TwoDoubles logarithm(double base) {
  uint64_t bits;
  memcpy(&bits, &base, sizeof(bits));
  double exponent = static_cast<double>(static_cast<int64_t>(bits >> 52) - 1023);
  bits = (bits & 0x000fffffffffffffu) | 0x3ff0000000000000u;
  double m;
  memcpy(&m, &bits, sizeof(m));
  if (m > 0x1.6a09e667f3bcdp0) m *= 0.5, exponent += 1;  // sqrt(2): m is within a factor of sqrt(2) of 1
  // ln m = 2 (f + f^3 / 3 + f^5 / 5 + ...) with f = (m - 1) / (m + 1), which is below 0.172. m - 1 is exact.
  const TwoDoubles denominator = exact_sum(m, 1.0);
  TwoDoubles f = {(m - 1.0) / denominator.high, 0};
  const TwoDoubles whole = exact_product(f.high, denominator.high);
  f.low = ((((m - 1.0) - whole.high) - whole.low) - f.high * denominator.low) / denominator.high;
  const TwoDoubles f2 = product(f, f);
  // From f^5 on, which is below f / 5,000, a double is enough; terms below 2^-66 are left out.
  double tail = 0;
  for (int k = 27; k >= 5; k -= 2) tail = tail * f2.high + 1.0 / k;
  const TwoDoubles third = product(f2, TwoDoubles{0x1.5555555555555p-2, 0x1.5555555555555p-56});
  TwoDoubles series = exact_sum(third.high, f2.high * f2.high * tail);
  series.low += third.low;
  const TwoDoubles rest = product(f, series);
  TwoDoubles ln_m = exact_sum(f.high, rest.high);
  ln_m.low += f.low + rest.low;
  const TwoDoubles sum = exact_sum(exponent * kLn2High, 2 * ln_m.high);
  return exact_sum(sum.high, sum.low + (exponent * kLn2Low + 2 * ln_m.low));
}

// base^exponent for a base of at least 1 and an exponent of at least 0, with an error below 0.7 units in the last place
// (tests/native/test_power.cc); NaN for any other base, and for an exponent that is NaN.
PADDLE_ASGD_HOST_DEVICE double power(double base, double exponent) {
  constexpr double kInfinity = __builtin_huge_val();
  if (!(base >= 1) || !(exponent >= 0)) return kInfinity - kInfinity;
  if (base == 1 || exponent == 0) return 1;
  if (base == kInfinity) return kInfinity;
  if (exponent == 1) return base;
  const TwoDoubles ln = logarithm(base);
  if (exponent * ln.high > 710) return kInfinity;
  const TwoDoubles exact = exact_product(exponent, ln.high);
  // exp(n ln 2 + r) = 2^n exp(r). Adding 1.5 * 2^52 and taking it away rounds to a whole number.
  const double n = (exact.high * 0x1.71547652b82fep0 + 0x1.8p52) - 0x1.8p52;
  TwoDoubles r = exact_sum(exact.high, -(n * kLn2High));
  r = exact_sum(r.high, r.low + ((exact.low + exponent * ln.low) - n * kLn2Low));
  double tail = 0;
  for (int k = 15; k >= 3; --k) tail = (tail + 1) * (r.high * (1.0 / k));
  // exp(r) = 1 + r + r^2 / 2 (1 + r / 3 (1 + r / 4 (...))), of which the first two terms are exact.
  const TwoDoubles first = exact_sum(1.0, r.high);
  const double square = 0.5 * r.high * r.high;
  const double mantissa = first.high + (first.low + (r.low + r.high * r.low) + square * (1 + tail));
  // In two factors, each of which is a normal number: 2^1024 is none.
  const int64_t half = static_cast<int64_t>(n) / 2, other = static_cast<int64_t>(n) - half;
  const uint64_t bits[2] = {static_cast<uint64_t>(half + 1023) << 52, static_cast<uint64_t>(other + 1023) << 52};
  double scale[2];
  memcpy(scale, bits, sizeof(scale));
  return mantissa * scale[0] * scale[1];
}

}  // namespace paddle_asgd
