// SPDX-License-Identifier: Apache-2.0
// average_cpu and average_cuda: every pair of storage types, element by element, and what they may not touch.
// `test_average cpu` tests the CPU's kernel, `test_average cuda` the other. Must not test which tensors are given.
#include "average_formula.h"
#include "driver.h"
#include "pairs.h"

namespace native_test {
namespace {

void run(const AverageArgs& args) {
  if (!on_cuda) return paddle_asgd::average_cpu(args);
  const char* error = paddle_asgd::average_cuda(args, 0, nullptr);
  CHECK(error == nullptr, "%s", error);
}

double averaged(const Pair& pair, int64_t e, double weight) {
  const double a = pair.first.at(e), x = pair.second.at(e);
  return pair.first_dtype == DType::kFloat64
             ? paddle_asgd::average<double>(a, x, weight)
             : paddle_asgd::average<float>(static_cast<float>(a), static_cast<float>(x), static_cast<float>(weight));
}

void check_average(DType first, DType second, double weight, size_t count = 0) {
  const PairList pairs = pairs_of(first, second, count);
  std::vector<std::vector<double>> expected;
  std::vector<std::string> values;
  for (const auto& pair : pairs) {
    expected.emplace_back();
    for (int64_t e = 0; e < pair->numel; ++e) expected.back().push_back(averaged(*pair, e, weight));
    values.push_back(pair->second.bytes());
  }
  AverageArgs args{};
  const auto list = listed(pairs, [](const Pair& pair) { return pair.args(); });
  args.averaged = list_of(list, weight);
  run(args);
  for (size_t i = 0; i < pairs.size(); ++i) {
    CHECK(pairs[i]->second.bytes() == values[i], "value %zu", i);
    for (int64_t e = 0; e < pairs[i]->numel; ++e) {
      CHECK(same(pairs[i]->first.at(e), expected[i][e]), "types %d %d, weight %g, tensor %zu[%lld]: %.17g, not %.17g",
            static_cast<int>(first), static_cast<int>(second), weight, i, static_cast<long long>(e),
            pairs[i]->first.at(e), expected[i][e]);
    }
  }
}

void check_round(DType first, DType second) {
  const PairList pairs = pairs_of(first, second);
  AverageArgs args{};
  const auto list = listed(pairs, [](const Pair& pair) { return pair.args(); });
  args.rounded = list_of(list);
  run(args);
  for (const auto& pair : pairs) {
    Buffer expected(first, pair->numel);
    for (int64_t e = 0; e < pair->numel; ++e) {
      // Buffer rounds by way of float, which is one rounding too many for a double: see check_one_rounding().
      const double value = pair->second.at(e);
      expected.put(e, first == DType::kFloat64 || second == DType::kFloat32 ? value : paddle_asgd::round_to_odd(value));
      const double wanted = first == DType::kFloat32 ? static_cast<float>(value) : expected.at(e);
      CHECK(same(pair->first.at(e), wanted), "types %d %d [%lld]: %.17g, not %.17g", static_cast<int>(first),
            static_cast<int>(second), static_cast<long long>(e), pair->first.at(e), wanted);
    }
  }
}

// A float64 just above or below the middle between two 16-bit numbers lies on it as a float32.
void check_one_rounding() {
  struct Row {
    DType dtype;
    double value, expected;
  };
  const double tiny = std::ldexp(1.0, -40);
  const Row rows[] = {{DType::kFloat16, 1 + std::ldexp(1.0, -11) + tiny, 1 + std::ldexp(1.0, -10)},
                      {DType::kFloat16, 1 + std::ldexp(3.0, -11) - tiny, 1 + std::ldexp(1.0, -10)},
                      {DType::kFloat16, -1 - std::ldexp(1.0, -11) - tiny, -1 - std::ldexp(1.0, -10)},
                      {DType::kFloat16, 1 + std::ldexp(1.0, -11), 1},
                      {DType::kBFloat16, 1 + std::ldexp(1.0, -8) + tiny, 1 + std::ldexp(1.0, -7)},
                      {DType::kBFloat16, 1 + std::ldexp(3.0, -8) - tiny, 1 + std::ldexp(1.0, -7)},
                      {DType::kBFloat16, 1e300, INFINITY},
                      {DType::kFloat16, -1e300, -INFINITY},
                      {DType::kFloat16, 65520 - 1e-9, 65504},
                      {DType::kBFloat16, 1e-300, 0},
                      {DType::kFloat16, NAN, NAN}};
  for (const Row& row : rows) {
    Pair pair(row.dtype, DType::kFloat64, 1, 1);
    pair.second.put(0, row.value);
    const std::vector<PairArgs> list = {pair.args()};
    AverageArgs args{};
    args.rounded = list_of(list);
    run(args);
    CHECK(same(pair.first.at(0), row.expected), "%.17g: %.17g, not %.17g", row.value, pair.first.at(0), row.expected);
  }
}

void check_bytes(DType dtype) {
  for (const bool exchanges : {false, true}) {
    const PairList pairs = pairs_of(dtype, dtype, 40);
    std::vector<std::string> first, second;
    for (const auto& pair : pairs) first.push_back(pair->first.bytes()), second.push_back(pair->second.bytes());
    const auto list = listed(pairs, [](const Pair& pair) { return pair.bytes(); });
    AverageArgs args{};
    (exchanges ? args.exchanged : args.copied) = list_of(list);
    run(args);
    for (size_t i = 0; i < pairs.size(); ++i) {
      CHECK(pairs[i]->first.bytes() == second[i], "first %zu", i);
      CHECK(pairs[i]->second.bytes() == (exchanges ? first : second)[i], "second %zu", i);
    }
  }
}

// The average of what it has seen lies within it, to one unit in the last place.
template <typename T>
void check_bounds() {
  Random random(5);
  for (int trial = 0; trial < 200000; ++trial) {
    const T a = static_cast<T>(random.number()), x = static_cast<T>(random.number());
    const T weight = static_cast<T>(static_cast<double>(random.next() >> 11) * 0x1p-53);
    const T got = paddle_asgd::average<T>(a, x, weight);
    const T low = std::nextafter(std::min(a, x), -INFINITY), high = std::nextafter(std::max(a, x), INFINITY);
    CHECK(got >= low && got <= high, "%.17g and %.17g by %.17g: %.17g", static_cast<double>(a), static_cast<double>(x),
          static_cast<double>(weight), static_cast<double>(got));
  }
}

}  // namespace
}  // namespace native_test

int main(int argc, char** argv) {
  using namespace native_test;
  choose_kernel(argc, argv);
  constexpr DType kAll[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};
  run(AverageArgs{});
  for (const DType value : kAll) {
    for (const double weight : {0.0, 0.001, 0.3, 1.0}) {
      if (value != DType::kFloat64) check_average(DType::kFloat32, value, weight);
      check_average(DType::kFloat64, value, weight);
    }
    check_bytes(value);
    for (const DType source : {DType::kFloat32, DType::kFloat64}) {
      if (source != value) check_round(value, source);
    }
  }
  check_average(DType::kFloat32, DType::kFloat32, 0.3, 2000);
  check_one_rounding();
  check_bounds<float>();
  check_bounds<double>();
  return 0;
}
