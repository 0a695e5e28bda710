// SPDX-License-Identifier: Apache-2.0
// The sum of the history on the CPU, for the few elements whose d a step computes anew (asgd_refresh.h says which).
// Must not decide which elements those are, nor write d.
#include <algorithm>
#include <type_traits>

#include "asgd_cpu.h"
#include "block_scale.h"
#include "half.h"

namespace paddle_asgd {
namespace {

// Adds kSlots slots to the sums, in the order of the slots: another order would give other bits than the GPU's.
// `stored` gives the number that slot k, counted from the first of them, holds of element j.
template <int kSlots, bool kWeighted, typename T, typename Stored>
PADDLE_ASGD_INLINE void add_slots(double* __restrict__ sums, const Stored& stored, const double* weights,
                                  int64_t length) {
  double rounded[kSlots] = {};
  // The weights are rounded as the step rounds them, so that d and this sum are sums of the same numbers.
  for (int k = 0; kWeighted && k < kSlots; ++k) rounded[k] = static_cast<double>(static_cast<T>(weights[k]));
  for (int64_t j = 0; j < length; ++j) {
    double sum = sums[j];
// Without full unrolling gcc reads the slots one after the other, and the eight streams of memory become one.
#pragma GCC unroll 8
    for (int k = 0; k < kSlots; ++k) {
      const double number = static_cast<double>(stored(k, j));
      sum += kWeighted ? rounded[k] * number : number;
    }
    sums[j] = sum;
  }
}

// Reads eight slots at once, because one stream of memory alone is far from the bandwidth that the rest of the step
// gets. The sums of a unit stay in the first-level cache meanwhile. `add` adds slots from the i-th on, as many as its
// first argument says.
template <typename Add>
PADDLE_ASGD_INLINE void add_by_eights(int64_t n, const Add& add) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) add(std::integral_constant<int, 8>(), i);
  for (; i < n; ++i) add(std::integral_constant<int, 1>(), i);
}

template <bool kWeighted, typename G, typename T>
PADDLE_ASGD_INLINE void sum_exact(double* sums, const TensorArgs& t, int64_t begin, const double* weights, int64_t n,
                                  int64_t length) {
  const int64_t numel = t.numel;
  add_by_eights(n, [=](auto slots, int64_t i) {
    const G* y = static_cast<const G*>(t.y) + i * numel + begin;
    const auto stored = [=](int k, int64_t j) { return widen(y[k * numel + j]); };
    add_slots<slots, kWeighted, T>(sums, stored, kWeighted ? weights + i : nullptr, length);
  });
}

// Block by block of the scales, of which each slot has one.
template <bool kWeighted, typename Q, typename T>
PADDLE_ASGD_INLINE void sum_narrow(double* sums, const TensorArgs& t, int64_t begin, const double* weights, int64_t n,
                                   int64_t length) {
  const int64_t numel = t.numel, blocks = scale_blocks(numel);
  for (int64_t at = 0; at < length; at += kScaleBlock) {
    const int64_t left = std::min(kScaleBlock, length - at);
    add_by_eights(n, [=](auto slots, int64_t i) {
      const Q* y = static_cast<const Q*>(t.y) + i * numel + begin + at;
      float scales[slots];
      for (int k = 0; k < slots; ++k) scales[k] = t.y_scale[(i + k) * blocks + (begin + at) / kScaleBlock];
      // Rounded to T as the step rounds it: d is the sum of what the step adds.
      const auto stored = [=, &scales](int k, int64_t j) { return from_stored<T>(y[k * numel + j], scales[k]); };
      add_slots<slots, kWeighted, T>(sums + at, stored, kWeighted ? weights + i : nullptr, left);
    });
  }
}

// One function for each type of stored gradient. If the step inlined this instead, it would be compiled once more for
// every combination of types there.
#define PADDLE_ASGD_SUM(name, sum, kWeighted, S, T)                                                                \
  PADDLE_ASGD_CLONES void name(double* sums, const TensorArgs& t, int64_t begin, const double* weights, int64_t n, \
                               int64_t length) {                                                                   \
    sum<kWeighted, S, T>(sums, t, begin, weights, n, length);                                                      \
  }
PADDLE_ASGD_SUM(sum_float32, sum_exact, false, float, float)
PADDLE_ASGD_SUM(sum_float64, sum_exact, false, double, double)
PADDLE_ASGD_SUM(sum_float16, sum_exact, false, Float16, float)
PADDLE_ASGD_SUM(sum_bfloat16, sum_exact, false, BFloat16, float)
PADDLE_ASGD_SUM(sum_float32_weighted, sum_exact, true, float, float)
PADDLE_ASGD_SUM(sum_float64_weighted, sum_exact, true, double, double)
PADDLE_ASGD_SUM(sum_float16_weighted, sum_exact, true, Float16, float)
PADDLE_ASGD_SUM(sum_bfloat16_weighted, sum_exact, true, BFloat16, float)
PADDLE_ASGD_SUM(sum_int16, sum_narrow, false, int16_t, float)
PADDLE_ASGD_SUM(sum_int8, sum_narrow, false, int8_t, float)
PADDLE_ASGD_SUM(sum_int16_weighted, sum_narrow, true, int16_t, float)
PADDLE_ASGD_SUM(sum_int8_weighted, sum_narrow, true, int8_t, float)
PADDLE_ASGD_SUM(sum_int16_float64, sum_narrow, false, int16_t, double)
PADDLE_ASGD_SUM(sum_int8_float64, sum_narrow, false, int8_t, double)
PADDLE_ASGD_SUM(sum_int16_float64_weighted, sum_narrow, true, int16_t, double)
PADDLE_ASGD_SUM(sum_int8_float64_weighted, sum_narrow, true, int8_t, double)
#undef PADDLE_ASGD_SUM

}  // namespace

SumFunction sum_function(const TensorArgs& t, bool weighted) {
  // A type that is added to DType must be added to both rows at the same position.
  static constexpr SumFunction kExact[2][4] = {
      {sum_float32, sum_float64, sum_float16, sum_bfloat16},
      {sum_float32_weighted, sum_float64_weighted, sum_float16_weighted, sum_bfloat16_weighted}};
  static constexpr SumFunction kNarrow[2][2][2] = {
      // float64 or not, int8 or not, weighted or not
      {{sum_int16, sum_int16_weighted}, {sum_int8, sum_int8_weighted}},
      {{sum_int16_float64, sum_int16_float64_weighted}, {sum_int8_float64, sum_int8_float64_weighted}}};
  if (t.history == History::kExact) return kExact[weighted][static_cast<int>(t.grad_dtype)];
  return kNarrow[t.param_dtype == DType::kFloat64][t.history == History::kInt8][weighted];
}

}  // namespace paddle_asgd
