// SPDX-License-Identifier: Apache-2.0
// The sum of the history on the CPU, for the few elements whose d a step computes anew (asgd_refresh.h says which).
// Must not decide which elements those are, nor write d.
#include <algorithm>

#include "asgd_cpu.h"
#include "block_scale.h"
#include "half.h"

namespace paddle_asgd {
namespace {

// Adds kSlots slots to the sums, in the order of the slots: another order would give other bits than the GPU's.
template <int kSlots, bool kWeighted, typename G, typename T>
PADDLE_ASGD_INLINE void add_slots(double* __restrict__ sums, const G* __restrict__ y_i, const double* weights,
                                  int64_t numel, int64_t length) {
  double rounded[kSlots] = {};
  // The weights are rounded as the step rounds them, so that d and this sum are sums of the same numbers.
  for (int k = 0; kWeighted && k < kSlots; ++k) rounded[k] = static_cast<double>(static_cast<T>(weights[k]));
  for (int64_t j = 0; j < length; ++j) {
    double sum = sums[j];
// Without full unrolling gcc reads the slots one after the other, and the eight streams of memory become one.
#pragma GCC unroll 8
    for (int k = 0; k < kSlots; ++k) {
      const double stored = static_cast<double>(widen(y_i[k * numel + j]));
      sum += kWeighted ? rounded[k] * stored : stored;
    }
    sums[j] = sum;
  }
}

// Reads eight slots at once, because one stream of memory alone is far from the bandwidth that the rest of the step
// gets. The sums of a unit stay in the first-level cache meanwhile.
template <bool kWeighted, typename G, typename T>
PADDLE_ASGD_INLINE void sum_history(double* sums, const G* y, const double* weights, int64_t n, int64_t numel,
                                    int64_t length) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    add_slots<8, kWeighted, G, T>(sums, y + i * numel, kWeighted ? weights + i : nullptr, numel, length);
  for (; i < n; ++i)
    add_slots<1, kWeighted, G, T>(sums, y + i * numel, kWeighted ? weights + i : nullptr, numel, length);
}

// The same for slots of a narrow history, which are `numel` stored numbers and `blocks` scales apart; `length` elements
// of one block.
template <int kSlots, bool kWeighted, typename Q, typename T>
PADDLE_ASGD_INLINE void add_narrow_slots(double* __restrict__ sums, const Q* __restrict__ y, const float* scale,
                                         const double* weights, int64_t numel, int64_t blocks, int64_t length) {
  double rounded[kSlots] = {};
  float scales[kSlots];
  for (int k = 0; k < kSlots; ++k) {
    scales[k] = scale[k * blocks];
    if (kWeighted) rounded[k] = static_cast<double>(static_cast<T>(weights[k]));
  }
  for (int64_t j = 0; j < length; ++j) {
    double sum = sums[j];
#pragma GCC unroll 8
    for (int k = 0; k < kSlots; ++k) {
      // Rounded to T as the step rounds it: d is the sum of what the step adds.
      const double stored = static_cast<double>(from_stored<T>(y[k * numel + j], scales[k]));
      sum += kWeighted ? rounded[k] * stored : stored;
    }
    sums[j] = sum;
  }
}

template <bool kWeighted, typename Q, typename T>
PADDLE_ASGD_INLINE void sum_narrow(double* sums, const TensorArgs& t, int64_t begin, const double* weights, int64_t n,
                                   int64_t length) {
  const int64_t numel = t.numel, blocks = scale_blocks(numel);
  for (int64_t at = 0; at < length; at += kScaleBlock) {
    const int64_t left = std::min(kScaleBlock, length - at);
    const Q* y = static_cast<const Q*>(t.y) + begin + at;
    const float* scale = t.y_scale + (begin + at) / kScaleBlock;
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
      add_narrow_slots<8, kWeighted, Q, T>(sums + at, y + i * numel, scale + i * blocks,
                                           kWeighted ? weights + i : nullptr, numel, blocks, left);
    for (; i < n; ++i)
      add_narrow_slots<1, kWeighted, Q, T>(sums + at, y + i * numel, scale + i * blocks,
                                           kWeighted ? weights + i : nullptr, numel, blocks, left);
  }
}

// One function for each type of stored gradient. If the step inlined this instead, it would be compiled once more for
// every combination of types there.
#define PADDLE_ASGD_SUM(name, kWeighted, G, T)                                                                     \
  PADDLE_ASGD_CLONES void name(double* sums, const TensorArgs& t, int64_t begin, const double* weights, int64_t n, \
                               int64_t length) {                                                                   \
    sum_history<kWeighted, G, T>(sums, static_cast<const G*>(t.y) + begin, weights, n, t.numel, length);           \
  }
PADDLE_ASGD_SUM(sum_float32, false, float, float)
PADDLE_ASGD_SUM(sum_float64, false, double, double)
PADDLE_ASGD_SUM(sum_float16, false, Float16, float)
PADDLE_ASGD_SUM(sum_bfloat16, false, BFloat16, float)
PADDLE_ASGD_SUM(sum_float32_weighted, true, float, float)
PADDLE_ASGD_SUM(sum_float64_weighted, true, double, double)
PADDLE_ASGD_SUM(sum_float16_weighted, true, Float16, float)
PADDLE_ASGD_SUM(sum_bfloat16_weighted, true, BFloat16, float)
#undef PADDLE_ASGD_SUM

#define PADDLE_ASGD_SUM_NARROW(name, kWeighted, Q, T)                                                              \
  PADDLE_ASGD_CLONES void name(double* sums, const TensorArgs& t, int64_t begin, const double* weights, int64_t n, \
                               int64_t length) {                                                                   \
    sum_narrow<kWeighted, Q, T>(sums, t, begin, weights, n, length);                                               \
  }
PADDLE_ASGD_SUM_NARROW(sum_int16, false, int16_t, float)
PADDLE_ASGD_SUM_NARROW(sum_int8, false, int8_t, float)
PADDLE_ASGD_SUM_NARROW(sum_int16_weighted, true, int16_t, float)
PADDLE_ASGD_SUM_NARROW(sum_int8_weighted, true, int8_t, float)
PADDLE_ASGD_SUM_NARROW(sum_int16_float64, false, int16_t, double)
PADDLE_ASGD_SUM_NARROW(sum_int8_float64, false, int8_t, double)
PADDLE_ASGD_SUM_NARROW(sum_int16_float64_weighted, true, int16_t, double)
PADDLE_ASGD_SUM_NARROW(sum_int8_float64_weighted, true, int8_t, double)
#undef PADDLE_ASGD_SUM_NARROW

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
