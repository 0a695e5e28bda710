// SPDX-License-Identifier: Apache-2.0
// The averages of a model's weights on the CPU, and their exchange with the weights. Must not include Paddle, and must
// not write the formula again (average_formula.h).
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "average_formula.h"
#include "average_kernel.h"
#include "platform.h"
#include "storage.h"

namespace paddle_asgd {
namespace {

// What is exchanged passes through a buffer, as kBlock elements do (storage.h).
constexpr int64_t kBlockBytes = 4096;

template <typename T, typename V>
PADDLE_ASGD_INLINE void average_range(T* __restrict__ a, const V* __restrict__ x, T weight, int64_t length) {
  for (int64_t e = 0; e < length; ++e) a[e] = average<T>(a[e], static_cast<T>(x[e]), weight);
}

template <typename T, typename V>
PADDLE_ASGD_INLINE void average_pair(const PairArgs& pair, double weight) {
  T* a = static_cast<T*>(pair.first);
  const V* x = static_cast<const V*>(pair.second);
  const T w = static_cast<T>(weight);
  if constexpr (sizeof(V) > 2) {
    average_range<T, V>(a, x, w, pair.numel);
  } else {
    float wide[kBlock];
    for (int64_t begin = 0; begin < pair.numel; begin += kBlock) {
      const int64_t length = std::min(kBlock, pair.numel - begin);
      widen_array(x + begin, wide, length);
      average_range<T, float>(a + begin, wide, w, length);
    }
  }
}

// Function templates cannot be cloned, so each combination of storage types gets a function of its own.
#define PADDLE_ASGD_AVERAGE(name, T, V) \
  PADDLE_ASGD_CLONES void name(const PairArgs& pair, double weight) { average_pair<T, V>(pair, weight); }
PADDLE_ASGD_AVERAGE(average_32_of_32, float, float)
PADDLE_ASGD_AVERAGE(average_32_of_float16, float, Float16)
PADDLE_ASGD_AVERAGE(average_32_of_bfloat16, float, BFloat16)
PADDLE_ASGD_AVERAGE(average_64_of_32, double, float)
PADDLE_ASGD_AVERAGE(average_64_of_64, double, double)
PADDLE_ASGD_AVERAGE(average_64_of_float16, double, Float16)
PADDLE_ASGD_AVERAGE(average_64_of_bfloat16, double, BFloat16)
#undef PADDLE_ASGD_AVERAGE

using AverageFunction = void (*)(const PairArgs&, double);
// By the DType of the value; a float32 average has no float64 value.
constexpr AverageFunction kAverage32[] = {average_32_of_32, nullptr, average_32_of_float16, average_32_of_bfloat16};
constexpr AverageFunction kAverage64[] = {average_64_of_32, average_64_of_64, average_64_of_float16,
                                          average_64_of_bfloat16};

PADDLE_ASGD_INLINE void round_range(const float* from, Float16* to, int64_t length) { narrow_array(from, to, length); }
PADDLE_ASGD_INLINE void round_range(const float* from, BFloat16* to, int64_t length) { narrow_array(from, to, length); }

template <typename P>
PADDLE_ASGD_INLINE void round_range(const double* __restrict__ from, P* __restrict__ to, int64_t length) {
  if constexpr (sizeof(P) == 2) {
    float odd[kBlock];
    for (int64_t e = 0; e < length; ++e) odd[e] = round_to_odd(from[e]);
    narrow_array(odd, to, length);
  } else {
    for (int64_t e = 0; e < length; ++e) narrow(from[e], to + e);
  }
}

PADDLE_ASGD_INLINE void round_range(const float* __restrict__ from, double* __restrict__ to, int64_t length) {
  for (int64_t e = 0; e < length; ++e) narrow(from[e], to + e);
}

template <typename P, typename T>
PADDLE_ASGD_INLINE void round_pair(const PairArgs& pair) {
  P* to = static_cast<P*>(pair.first);
  const T* from = static_cast<const T*>(pair.second);
  for (int64_t begin = 0; begin < pair.numel; begin += kBlock) {
    const int64_t length = std::min(kBlock, pair.numel - begin);
    round_range(from + begin, to + begin, length);
  }
}

#define PADDLE_ASGD_ROUND(name, P, T) \
  PADDLE_ASGD_CLONES void name(const PairArgs& pair) { round_pair<P, T>(pair); }
PADDLE_ASGD_ROUND(round_32_to_64, double, float)
PADDLE_ASGD_ROUND(round_32_to_float16, Float16, float)
PADDLE_ASGD_ROUND(round_32_to_bfloat16, BFloat16, float)
PADDLE_ASGD_ROUND(round_64_to_32, float, double)
PADDLE_ASGD_ROUND(round_64_to_float16, Float16, double)
PADDLE_ASGD_ROUND(round_64_to_bfloat16, BFloat16, double)
#undef PADDLE_ASGD_ROUND

using RoundFunction = void (*)(const PairArgs&);
// By the DType that is rounded to; equal ones are copied.
constexpr RoundFunction kRound32[] = {nullptr, round_32_to_64, round_32_to_float16, round_32_to_bfloat16};
constexpr RoundFunction kRound64[] = {round_64_to_32, nullptr, round_64_to_float16, round_64_to_bfloat16};

// In blocks: no copy of a whole tensor is ever made.
void exchange(const PairArgs& pair) {
  char *a = static_cast<char*>(pair.first), *b = static_cast<char*>(pair.second);
  alignas(64) char block[kBlockBytes];
  for (int64_t begin = 0; begin < pair.numel; begin += kBlockBytes) {
    const int64_t length = std::min(kBlockBytes, pair.numel - begin);
    std::memcpy(block, a + begin, length);
    std::memcpy(a + begin, b + begin, length);
    std::memcpy(b + begin, block, length);
  }
}

template <typename Work>
void for_each(const Pairs& pairs, const Work& work) {
  for (int64_t i = 0; i < pairs.count; ++i) {
    if (pairs.begin[i].numel > 0) work(pairs.begin[i]);
  }
}

}  // namespace

void average_cpu(const AverageArgs& args) {
  for_each(args.averaged, [&](const PairArgs& pair) {
    const auto& functions = pair.first_dtype == DType::kFloat64 ? kAverage64 : kAverage32;
    functions[static_cast<int>(pair.second_dtype)](pair, args.averaged.weight);
  });
  for_each(args.rounded, [](const PairArgs& pair) {
    const auto& functions = pair.second_dtype == DType::kFloat64 ? kRound64 : kRound32;
    functions[static_cast<int>(pair.first_dtype)](pair);
  });
  for_each(args.copied, [](const PairArgs& pair) { std::memcpy(pair.first, pair.second, pair.numel); });
  for_each(args.exchanged, exchange);
}

}  // namespace paddle_asgd
