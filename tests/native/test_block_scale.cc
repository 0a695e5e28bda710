// SPDX-License-Identifier: Apache-2.0
// Numbers stored as integers with a scale for each block: what is promised of them, computed in double. Must not run a
// kernel.
#include <algorithm>
#include <cfloat>

#include "block_scale.h"
#include "check.h"
#include "tensors.h"

namespace native_test {
namespace {

using paddle_asgd::BlockScale;
using paddle_asgd::kLargestStored;

template <typename T, typename Q>
struct Block {
  explicit Block(const std::vector<T>& numbers) {
    uint32_t bits = 0;
    for (const T number : numbers) bits = std::max(bits, paddle_asgd::magnitude_bits(paddle_asgd::to_scaled(number)));
    scale = paddle_asgd::block_scale<Q>(bits);
    for (const T number : numbers) {
      stored.push_back(paddle_asgd::to_stored<Q>(paddle_asgd::to_scaled(number), scale.inverse));
    }
  }
  T read(size_t i) const { return paddle_asgd::from_stored<T>(stored[i], scale.scale); }
  BlockScale scale;
  std::vector<Q> stored;
};

// What is read back is at most half a step of the scale away, and the largest number stays what it was but for
// rounding.
template <typename T, typename Q>
void check_precision(double magnitude) {
  Random random(5);
  std::vector<T> numbers;
  for (int i = 0; i < 128; ++i) numbers.push_back(static_cast<T>(magnitude * random.number()));
  const Block<T, Q> block(numbers);
  double largest = 0;
  for (const T number : numbers) largest = std::max(largest, std::fabs(static_cast<double>(number)));
  CHECK(std::fabs(block.scale.scale * double{kLargestStored<Q>} - largest) <= 2e-7 * largest, "%g", magnitude);
  for (size_t i = 0; i < numbers.size(); ++i) {
    const double off = std::fabs(static_cast<double>(block.read(i)) - static_cast<double>(numbers[i]));
    CHECK(off <= 0.5001 * block.scale.scale + 2e-7 * largest, "%g: %a is read as %a", magnitude,
          static_cast<double>(numbers[i]), static_cast<double>(block.read(i)));
  }
}

// Halves go to the even neighbour: the largest number makes the scale 1.
template <typename Q>
void check_ties() {
  const float most = kLargestStored<Q>;
  const Block<float, Q> block({most, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, most - 0.5f, -most, -0.0f, 0.49f, -0.51f});
  const int expected[] = {int(most), 0, 2, 2, 0, -2, -2, int(most) - 1, -int(most), 0, 0, -1};
  CHECK(block.scale.scale == 1, "%a", block.scale.scale);
  for (size_t i = 0; i < block.stored.size(); ++i) {
    CHECK(block.stored[i] == expected[i], "%zu: %d, not %d", i, block.stored[i], expected[i]);
  }
}

// Nothing finite is read as Inf or NaN, and what is too small is read as zero.
template <typename T, typename Q>
void check_extremes() {
  for (const double value : {0.0, -0.0, 0x1p-149, -0x1p-130, 9.9e-31}) {
    const Block<T, Q> block({static_cast<T>(value), T{0}});
    CHECK(block.scale.scale == 0 && block.stored[0] == 0 && block.read(0) == 0, "%a", value);
  }
  for (const double value : {1.1e-30, 1.0, -1e30, 3.3e38, -3.4e38, double{FLT_MAX}, -double{FLT_MAX}}) {
    const Block<T, Q> block({static_cast<T>(value), static_cast<T>(value / 4), T{0}});
    const double read = static_cast<double>(block.read(0));
    CHECK(std::fabs(read / value - 1) <= 1e-3 && std::isfinite(static_cast<float>(read)), "%a is read as %a", value,
          read);
    CHECK(block.read(2) == 0, "%a", value);
  }
  // The last carries bits that would reach the integer.
  const double marked = double{paddle_asgd::bits_to_float(0x7fc12345u)};
  for (const double value : {double{INFINITY}, -double{INFINITY}, double{NAN}, -double{NAN}, marked}) {
    const Block<T, Q> block({T{1}, static_cast<T>(value), T{0}});
    CHECK(paddle_asgd::float_to_bits(block.scale.scale) == 0x7fc00000u, "%a", value);
    for (size_t i = 0; i < 3; ++i) CHECK(block.stored[i] == 0 && std::isnan(block.read(i)), "%a", value);
  }
}

// A float64 that float32 cannot hold is its largest number, and not Inf.
void check_beyond_float32() {
  for (const double value : {1e300, -1e300, 3.5e38, DBL_MAX, -DBL_MAX}) {
    const Block<double, int16_t> block({value, 1.0});
    CHECK(std::fabs(block.read(0)) <= double{FLT_MAX} && std::fabs(block.read(0)) > 3.3e38, "%a", value);
    CHECK((block.read(0) > 0) == (value > 0), "%a", value);
  }
  CHECK(std::isinf(paddle_asgd::to_scaled(double{INFINITY})) && std::isnan(paddle_asgd::to_scaled(double{NAN})), "%s",
        "special numbers");
}

template <typename T, typename Q>
void check_all() {
  for (const double magnitude : {1e-29, 1e-20, 1e-3, 1.0, 1e10, 1e38}) check_precision<T, Q>(magnitude);
  check_extremes<T, Q>();
  check_ties<Q>();
}

}  // namespace
}  // namespace native_test

int main() {
  using namespace native_test;
  check_all<float, int16_t>();
  check_all<float, int8_t>();
  check_all<double, int16_t>();
  check_all<double, int8_t>();
  check_beyond_float32();
  return 0;
}
