// SPDX-License-Identifier: Apache-2.0
// The one way in which the native tests fail: a message with the place and the values, and exit status 1; and when two
// numbers count as equal. Must not know what is tested.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

// A kernel for the GPU returns CUDA's words about what went wrong, or null.
inline void succeed(const char* error) { CHECK(error == nullptr, "CUDA says '%s'", error); }

// Two sums of the same positive terms, added in any order: the order is worth no more than a rounding error a term.
inline bool close(double a, double b) { return std::abs(a - b) <= 1e-12 * std::abs(b); }

// Equal bits, but for the payload of a NaN, which the language does not fix.
inline bool same(double a, double b) {
  return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b);
}
