// SPDX-License-Identifier: Apache-2.0
// Reads and writes stretches of a narrow history on the CPU, in vector code. Must not say how a number is stored
// (block_scale.h).
#include <algorithm>

#include "asgd_history.h"

namespace paddle_asgd {
namespace {

template <typename Q, typename T>
PADDLE_ASGD_INLINE void read_block(const Q* __restrict__ y, float scale, T* __restrict__ out, int64_t length) {
  for (int64_t e = 0; e < length; ++e) out[e] = from_stored<T>(y[e], scale);
}

template <typename Q, typename T>
PADDLE_ASGD_INLINE void write_block(const T* __restrict__ g, Q* __restrict__ y, float* scale, T* __restrict__ stored,
                                    int64_t length) {
  uint32_t largest = 0;
  for (int64_t e = 0; e < length; ++e) largest = std::max(largest, magnitude_bits(to_scaled(g[e])));
  const BlockScale block = block_scale<Q>(largest);
  for (int64_t e = 0; e < length; ++e) y[e] = to_stored<Q>(to_scaled(g[e]), block.inverse);
  read_block<Q, T>(y, block.scale, stored, length);
  *scale = block.scale;
}

// A function template cannot be cloned, so each pair of types gets functions of its own.
#define PADDLE_ASGD_NARROW(name, Q, T)                                                                      \
  PADDLE_ASGD_CLONES void read_##name(const void* y, const float* scale, T* out, int64_t length) {          \
    for (int64_t begin = 0; begin < length; begin += kScaleBlock) {                                         \
      read_block<Q, T>(static_cast<const Q*>(y) + begin, scale[begin / kScaleBlock], out + begin,           \
                       std::min(kScaleBlock, length - begin));                                              \
    }                                                                                                       \
  }                                                                                                         \
  PADDLE_ASGD_CLONES void write_##name(const T* g, void* y, float* scale, T* stored, int64_t length) {      \
    for (int64_t begin = 0; begin < length; begin += kScaleBlock) {                                         \
      write_block<Q, T>(g + begin, static_cast<Q*>(y) + begin, scale + begin / kScaleBlock, stored + begin, \
                        std::min(kScaleBlock, length - begin));                                             \
    }                                                                                                       \
  }
PADDLE_ASGD_NARROW(int16_float32, int16_t, float)
PADDLE_ASGD_NARROW(int8_float32, int8_t, float)
PADDLE_ASGD_NARROW(int16_float64, int16_t, double)
PADDLE_ASGD_NARROW(int8_float64, int8_t, double)
#undef PADDLE_ASGD_NARROW

}  // namespace

const NarrowStorage<float>& narrow_storage(History history, float) {
  static constexpr NarrowStorage<float> kStorage[] = {{read_int16_float32, write_int16_float32},
                                                      {read_int8_float32, write_int8_float32}};
  return kStorage[history == History::kInt8];
}

const NarrowStorage<double>& narrow_storage(History history, double) {
  static constexpr NarrowStorage<double> kStorage[] = {{read_int16_float64, write_int16_float64},
                                                       {read_int8_float64, write_int8_float64}};
  return kStorage[history == History::kInt8];
}

}  // namespace paddle_asgd
