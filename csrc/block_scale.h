// SPDX-License-Identifier: Apache-2.0
// Numbers as int8 or int16 with one float32 scale for a block of them, for host and device: the narrow form of a
// history. Written once, so that both devices store the same bits. Must not know what the numbers are.
#pragma once

#include <cstdint>

#include "half.h"

namespace paddle_asgd {

// On a GPU one warp takes a block.
constexpr int64_t kScaleBlock = 128;

PADDLE_ASGD_HOST_DEVICE int64_t scale_blocks(int64_t numel) { return (numel + kScaleBlock - 1) / kScaleBlock; }

// The largest stored magnitude. The lowest int8 and int16 stay unused, so that both signs have the same range.
template <typename Q>
constexpr float kLargestStored = sizeof(Q) == 1 ? 127.0f : 32767.0f;

// Scales are float32, whatever the arithmetic is. A float64 that float32 cannot hold becomes its largest number,
// because Inf would make a NaN of its whole block.
PADDLE_ASGD_HOST_DEVICE float to_scaled(float value) { return value; }
PADDLE_ASGD_HOST_DEVICE float to_scaled(double value) {
  constexpr double kMost = 3.4028234663852886e38;  // of float32
  const double low = value < -kMost ? -kMost : value;
  const double bounded = low > kMost ? kMost : low;
  return static_cast<float>(value - value == 0 ? bounded : value);  // Inf and NaN stay what they are
}

// Magnitudes compare like these integers, and a NaN exceeds them all. Their maximum depends on no order.
PADDLE_ASGD_HOST_DEVICE uint32_t magnitude_bits(float value) { return float_to_bits(value) & 0x7fffffffu; }

struct BlockScale {
  float scale;    // a stored 1 stands for it
  float inverse;  // what a number is multiplied by; 0: all are stored as 0
};

// From the largest magnitude of a block.
template <typename Q>
PADDLE_ASGD_HOST_DEVICE BlockScale block_scale(uint32_t bits) {
  const float largest = bits_to_float(bits);
  // Zeros, and denormal numbers, whose reciprocal is Inf.
  if (largest < 1e-30f) return BlockScale{0.0f, 0.0f};
  // Inf or NaN: all of the block is read as NaN, until its slot is overwritten.
  if (bits >= 0x7f800000u) return BlockScale{bits_to_float(0x7fc00000u), 0.0f};
  // Bounded, because the quotient is rounded: its product with kLargestStored might be Inf.
  const float bounded = largest < 3.4e38f ? largest : 3.4e38f;
  return BlockScale{bounded / kLargestStored<Q>, kLargestStored<Q> / largest};
}

// Rounds to nearest even: the sum's last bits are the integer, on every processor and without a conversion.
template <typename Q>
PADDLE_ASGD_HOST_DEVICE Q to_stored(float value, float inverse) {
  constexpr uint32_t kShifter = 0x4b400000u;  // 1.5 * 2^23
  const uint32_t shifted = float_to_bits(value * inverse + bits_to_float(kShifter)) - kShifter;
  return static_cast<Q>(static_cast<int32_t>(inverse == 0.0f ? 0u : shifted));
}

template <typename T, typename Q>
PADDLE_ASGD_HOST_DEVICE T from_stored(Q stored, float scale) {
  return static_cast<T>(stored) * static_cast<T>(scale);
}

}  // namespace paddle_asgd
