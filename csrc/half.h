// SPDX-License-Identifier: Apache-2.0
// Conversions between the 16-bit floating formats and float32 or float64, rounding once to nearest even, the same bits
// on host and device. Must not use Paddle's or the compiler's own half types: their rounding differs between versions
// and flags.
#pragma once

#include <cstdint>
#include <cstring>

#include "platform.h"

namespace paddle_asgd {

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

PADDLE_ASGD_HOST_DEVICE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

PADDLE_ASGD_HOST_DEVICE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// The conversions below compute every case and select one of the results, so that loops over them vectorise.

PADDLE_ASGD_HOST_DEVICE float widen(Float16 half) {
  const uint32_t magnitude = half.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(half.bits & 0x8000u) << 16;
  // Normal numbers: move the exponent's bias from 15 to 127. Inf and NaN: the exponent becomes all ones.
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  // Subnormal numbers count units of 2^-24: set below 0.5, whose unit in the last place is 2^-24, and take 0.5 away.
  const uint32_t subnormal = float_to_bits(bits_to_float(0x3f000000u | magnitude) - 0.5f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return bits_to_float(sign | (magnitude < 0x7c00u ? finite : special));
}

PADDLE_ASGD_HOST_DEVICE Float16 narrow_to_float16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding just under half a unit, plus the last kept bit, carries exactly when nearest-even rounds up.
  const uint32_t normal = (magnitude - (112u << 23) + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14 the addition to 0.5 itself rounds to units of 2^-24, to nearest even.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  // From 65520 on the nearest half is infinity.
  return Float16{static_cast<uint16_t>(sign | (magnitude < 0x477ff000u ? finite : special))};
}

PADDLE_ASGD_HOST_DEVICE float widen(BFloat16 half) { return bits_to_float(static_cast<uint32_t>(half.bits) << 16); }

PADDLE_ASGD_HOST_DEVICE BFloat16 narrow_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // A NaN whose payload sits in the low bits would round to Inf, or past it to zero.
  const uint32_t nan = (bits >> 16) | 0x0040u;
  return BFloat16{static_cast<uint16_t>(value != value ? nan : rounded)};
}

// The float32 next to `value` towards zero, its last bit set if that is not exact. Rounded on to 16 bits it gives what
// one rounding of `value` gives: float32 has two bits more than that needs.
PADDLE_ASGD_HOST_DEVICE float round_to_odd(double value) {
  const float nearest = static_cast<float>(value);
  const double back = static_cast<double>(nearest);
  const bool beyond = value < 0 ? back < value : back > value;
  return bits_to_float((float_to_bits(nearest) - (beyond ? 1u : 0u)) | (back != value ? 1u : 0u));
}

// Storage type to and from the type the arithmetic is done in.
PADDLE_ASGD_HOST_DEVICE float widen(float value) { return value; }
PADDLE_ASGD_HOST_DEVICE double widen(double value) { return value; }
PADDLE_ASGD_HOST_DEVICE void narrow(float value, Float16* out) { *out = narrow_to_float16(value); }
PADDLE_ASGD_HOST_DEVICE void narrow(float value, BFloat16* out) { *out = narrow_to_bfloat16(value); }
PADDLE_ASGD_HOST_DEVICE void narrow(float value, float* out) { *out = value; }
PADDLE_ASGD_HOST_DEVICE void narrow(double value, double* out) { *out = value; }
// Of a float64 average.
PADDLE_ASGD_HOST_DEVICE void narrow(double value, Float16* out) { *out = narrow_to_float16(round_to_odd(value)); }
PADDLE_ASGD_HOST_DEVICE void narrow(double value, BFloat16* out) { *out = narrow_to_bfloat16(round_to_odd(value)); }
PADDLE_ASGD_HOST_DEVICE void narrow(double value, float* out) { *out = static_cast<float>(value); }
PADDLE_ASGD_HOST_DEVICE void narrow(float value, double* out) { *out = value; }

}  // namespace paddle_asgd
