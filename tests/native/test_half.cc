// SPDX-License-Identifier: Apache-2.0
// half.h against conversions computed another way: ldexp and nearbyint in double, and the processor's own where it has
// some; storage.h against half.h. `test_half all` takes every float32 instead of a selection (minutes). Must not
// test the step.
#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "half.h"
#include "storage.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "check.h"

namespace {

using paddle_asgd::BFloat16;
using paddle_asgd::bits_to_float;
using paddle_asgd::Float16;
using paddle_asgd::float_to_bits;

// A 16-bit format by the numbers that define it.
struct Format {
  const char* name;
  int mantissa_bits;
  int smallest_exponent;  // of a normal number
  int special_exponent;   // the biased one that Inf and NaN have
};
constexpr Format kFloat16{"float16", 10, -14, 31};
constexpr Format kBFloat16{"bfloat16", 7, -126, 255};

double expected_wide(Format f, uint16_t bits) {
  const int mantissa = bits & ((1 << f.mantissa_bits) - 1);
  const int biased = (bits >> f.mantissa_bits) & f.special_exponent;
  const double hidden = biased == 0 ? 0 : std::ldexp(1.0, f.mantissa_bits);
  const int exponent = (biased == 0 ? 1 : biased) - 1 + f.smallest_exponent - f.mantissa_bits;
  double magnitude = std::ldexp(hidden + mantissa, exponent);
  if (biased == f.special_exponent) magnitude = mantissa == 0 ? INFINITY : NAN;
  return std::copysign(magnitude, bits & 0x8000 ? -1.0 : 1.0);
}

double expected_narrow(Format f, float value) {
  if (!std::isfinite(value) || value == 0) return value;
  int exponent;
  std::frexp(value, &exponent);  // |value| in [0.5, 1) * 2^exponent
  const int unit = std::max(exponent - 1, f.smallest_exponent) - f.mantissa_bits;
  // Scaling by a power of two is exact in double, so this rounds once: to nearest, ties to even.
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(static_cast<double>(value), -unit)), unit);
  const double limit = std::ldexp(1.0, f.smallest_exponent + f.special_exponent - 1);
  return std::fabs(rounded) < limit ? rounded : std::copysign(INFINITY, rounded);
}

float widen(Format f, uint16_t bits) {
  return f.mantissa_bits == 10 ? paddle_asgd::widen(Float16{bits}) : paddle_asgd::widen(BFloat16{bits});
}

uint16_t narrow(Format f, float value) {
  Float16 half;
  BFloat16 brain;
  paddle_asgd::narrow(value, &half);
  paddle_asgd::narrow(value, &brain);
  return f.mantissa_bits == 10 ? half.bits : brain.bits;
}

void check_every_half(Format f) {
  for (uint32_t i = 0; i < 0x10000u; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    const float wide = widen(f, bits);
    CHECK(same(wide, expected_wide(f, bits)) && std::signbit(wide) == (bits >= 0x8000u), "%s %04x: %a", f.name, bits,
          wide);
    const uint16_t back = narrow(f, wide);
    if (std::isnan(wide)) {
      CHECK(std::isnan(widen(f, back)) && (back & 0x8000u) == (bits & 0x8000u), "%s %04x: %04x", f.name, bits, back);
    } else {
      CHECK(back == bits, "%s %04x: %04x", f.name, bits, back);
    }
  }
}

void check_float(Format f, uint32_t bits) {
  const float value = bits_to_float(bits);
  const uint16_t half = narrow(f, value);
  CHECK(same(widen(f, half), expected_narrow(f, value)), "%s of %08x (%a): %04x", f.name, bits, value, half);
  CHECK((half >= 0x8000u) == std::signbit(value), "%s of %08x: sign of %04x", f.name, bits, half);
}

// Every half, the middle to its neighbour (a float32, so the tie itself is met), and the two floats on either side.
void check_boundaries(Format f) {
  const uint32_t half_unit = 1u << (22 - f.mantissa_bits);
  for (uint32_t i = 0; i < 0x10000u; ++i) {
    const uint32_t exact = float_to_bits(widen(f, static_cast<uint16_t>(i)));
    const double middle = (expected_wide(f, i) + expected_wide(f, (i & 0x8000u) | ((i + 1) & 0x7fffu))) / 2;
    const uint32_t tie = float_to_bits(static_cast<float>(middle));
    for (uint32_t offset = 0; offset < 5; ++offset) {
      check_float(f, exact + offset - 2);
      check_float(f, tie + offset - 2);
      check_float(f, exact + half_unit + offset - 2);
    }
  }
}

void check_named_values() {
  const struct {
    Format format;
    float value;
    uint16_t bits;
  } kTable[] = {
      {kFloat16, 65504.0f, 0x7bff},         {kFloat16, 65519.996f, 0x7bff},   {kFloat16, 65520.0f, 0x7c00},
      {kFloat16, -65520.0f, 0xfc00},        {kFloat16, 0x1p-24f, 0x0001},     {kFloat16, 0x1p-25f, 0x0000},
      {kFloat16, 0x1.000002p-25f, 1},       {kFloat16, 0x1.8p-24f, 0x0002},   {kFloat16, -0x1p-149f, 0x8000},
      {kFloat16, 0x1.ffep-15f, 0x0400},     {kFloat16, -0.0f, 0x8000},        {kBFloat16, 0x1.fep127f, 0x7f7f},
      {kBFloat16, 0x1.fefffep127f, 0x7f7f}, {kBFloat16, 0x1.ffp127f, 0x7f80}, {kBFloat16, 0x1p-133f, 0x0001},
      {kBFloat16, 0x1p-134f, 0x0000},       {kBFloat16, 0x1.8p-133f, 0x0002}, {kBFloat16, -0x1p-149f, 0x8000}};
  for (const auto& row : kTable) {
    CHECK(narrow(row.format, row.value) == row.bits, "%s of %a: %04x", row.format.name, row.value,
          narrow(row.format, row.value));
  }
  // A NaN by any one bit of the payload, in a truncation to 16 bits all too easily an Inf.
  for (const Format f : {kFloat16, kBFloat16}) {
    for (int bit = 0; bit < 23; ++bit) {
      check_float(f, 0x7f800000u | (1u << bit));
      check_float(f, 0xff800000u | (1u << bit));
    }
    check_float(f, 0x7fffffffu);
    check_float(f, 0xffffffffu);
  }
}

// Vectors of exactly that size, so that a sanitizer sees whoever goes beyond.
template <typename H>
void check_arrays(const char* name, const std::vector<uint32_t>& patterns) {
  std::vector<H> halves;
  std::vector<float> floats;
  for (const uint32_t bits : patterns) {
    halves.push_back(H{static_cast<uint16_t>(bits >> 16)});
    floats.push_back(bits_to_float(bits));
  }
  std::vector<float> wide(patterns.size());
  std::vector<H> narrowed(patterns.size());
  paddle_asgd::widen_array(halves.data(), wide.data(), wide.size());
  paddle_asgd::narrow_array(floats.data(), narrowed.data(), narrowed.size());
  for (size_t i = 0; i < patterns.size(); ++i) {
    const float one = paddle_asgd::widen(halves[i]);
    const uint32_t bits = float_to_bits(one), quiet = std::isnan(one) ? bits | 0x00400000u : bits;
    CHECK(float_to_bits(wide[i]) == bits || float_to_bits(wide[i]) == quiet, "%s %04x, %zu of %zu: %08x", name,
          halves[i].bits, i, wide.size(), float_to_bits(wide[i]));
    H half;
    paddle_asgd::narrow(floats[i], &half);
    CHECK(narrowed[i].bits == half.bits, "%s of %08x, %zu of %zu: %04x, not %04x", name, patterns[i], i, wide.size(),
          narrowed[i].bits, half.bits);
  }
}

void check_arrays() {
  // In the upper bits every half, in the lower ones what decides about rounding; then every length of a rest.
  std::vector<uint32_t> patterns;
  for (uint32_t i = 0; i < 0x10000u; ++i) {
    for (const uint32_t low : {0u, 1u, 0x0fffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, i * 2654435761u >> 16}) {
      patterns.push_back((i << 16) | low);
    }
  }
  check_arrays<Float16>("float16", patterns);
  check_arrays<BFloat16>("bfloat16", patterns);
  for (size_t length = 0; length < 80; ++length) {
    // Around 1, and a NaN last.
    std::vector<uint32_t> some(patterns.begin() + 0x3f80 * 9, patterns.begin() + 0x3f80 * 9 + length);
    if (length != 0) some.back() = 0xff812345u;
    check_arrays<Float16>("float16", some);
    check_arrays<BFloat16>("bfloat16", some);
  }
}

#if defined(__x86_64__)
__attribute__((target("f16c"))) void check_against_processor(uint32_t bits) {
  const float value = bits_to_float(bits);
  const uint16_t half = narrow(kFloat16, value);
  const uint16_t theirs = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
  CHECK(half == theirs || (std::isnan(value) && same(widen(kFloat16, half), _cvtsh_ss(theirs))), "%08x: %04x, not %04x",
        bits, half, theirs);
}

// Whoever computes may have told the processor to take subnormal float32 for zero: no half may depend on it.
void check_flushed() {
  for (uint32_t i = 0; i < 0x10000u; ++i) {
    for (const Format f : {kFloat16, kBFloat16}) {
      // Volatile, or the compiler computes both sides at once.
      const volatile uint32_t single = (i << 16) | (i * 2654435761u >> 16);
      const volatile uint16_t half = static_cast<uint16_t>(i);
      const uint16_t narrowed = narrow(f, bits_to_float(single));
      const uint32_t widened = float_to_bits(widen(f, half));
      const unsigned mode = _mm_getcsr();
      _mm_setcsr(mode | 0x8040u);
      const volatile uint16_t narrowed_flushed = narrow(f, bits_to_float(single));
      const volatile uint32_t widened_flushed = float_to_bits(widen(f, half));
      _mm_setcsr(mode);
      CHECK(narrowed == narrowed_flushed, "%s of %08x: %04x", f.name, single, narrowed_flushed);
      CHECK(widened == widened_flushed, "%s %04x: %08x", f.name, half, widened_flushed);
    }
  }
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040u);
  check_arrays();
  _mm_setcsr(mode);
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const bool all = argc > 1 && std::strcmp(argv[1], "all") == 0;
  for (const Format f : {kFloat16, kBFloat16}) {
    check_every_half(f);
    check_boundaries(f);
  }
  check_named_values();
  check_arrays();
  const uint64_t stride = all ? 1 : 4099;  // a prime: every low bit pattern meets every exponent
  for (uint64_t bits = 0; bits <= 0xffffffffu; bits += stride) {
    check_float(kFloat16, static_cast<uint32_t>(bits));
    check_float(kBFloat16, static_cast<uint32_t>(bits));
  }
#if defined(__x86_64__)
  check_flushed();
  if (__builtin_cpu_supports("f16c")) {
    for (uint64_t bits = 0; bits <= 0xffffffffu; bits += stride) check_against_processor(static_cast<uint32_t>(bits));
  }
#endif
  return 0;
}
