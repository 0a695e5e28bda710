// SPDX-License-Identifier: Apache-2.0
// The loops over a narrow history on the CPU. Must not say how a number is stored (block_scale.h), nor write the
// formula again (asgd_formula.h).
#include <algorithm>

#include "asgd_history.h"

namespace paddle_asgd {
namespace {

// Calls `block` for each block of a stretch. A length that the compiler knows lets it unroll the loops over a block.
template <typename Block>
PADDLE_ASGD_INLINE void for_each_block(int64_t length, const Block& block) {
  int64_t begin = 0;
  for (; begin + kScaleBlock <= length; begin += kScaleBlock) block(begin, kScaleBlock);
  if (begin < length) block(begin, length - begin);
}

template <typename Q, typename T>
PADDLE_ASGD_INLINE BlockScale scale_of(const T* g, int64_t length) {
  uint32_t largest = 0;
  for (int64_t e = 0; e < length; ++e) largest = std::max(largest, magnitude_bits(to_scaled(g[e])));
  return block_scale<Q>(largest);
}

template <typename Q, typename T>
PADDLE_ASGD_INLINE void read_stretch(const Q* __restrict__ y, const float* scale, T* __restrict__ out, int64_t length) {
  for_each_block(length, [=](int64_t begin, int64_t count) {
    const float own = scale[begin / kScaleBlock];
    for (int64_t e = begin; e < begin + count; ++e) out[e] = from_stored<T>(y[e], own);
  });
}

template <typename Q, typename T>
PADDLE_ASGD_INLINE void write_stretch(const T* __restrict__ g, Q* __restrict__ y, float* scale, int64_t length) {
  for_each_block(length, [=](int64_t begin, int64_t count) {
    const BlockScale block = scale_of<Q>(g + begin, count);
    for (int64_t e = begin; e < begin + count; ++e) y[e] = to_stored<Q>(to_scaled(g[e]), block.inverse);
    scale[begin / kScaleBlock] = block.scale;
  });
}

// d takes what is stored, so that it stays the sum of that. With a theta x also takes the gradient itself.
template <typename Q, typename T, bool kTheta>
PADDLE_ASGD_INLINE void update_block(T* __restrict__ x, const T* __restrict__ g, T* __restrict__ d, Q* __restrict__ y,
                                     float old_scale, BlockScale block, Coefficients<T> c, int64_t length) {
  for (int64_t e = 0; e < length; ++e) {
    const T old = from_stored<T>(y[e], old_scale);
    const Q q = to_stored<Q>(to_scaled(g[e]), block.inverse);
    const T sum = replace_gradient<T>(d[e], old, from_stored<T>(q, block.scale), c.weight);
    x[e] = kTheta ? descend_theta<T>(x[e], d[e], old, g[e], c) : descend<T>(x[e], sum, c);
    d[e] = sum;
    y[e] = q;
  }
}

// The search for a block's largest number waits for g alone, and the other arrays' reads do not begin meanwhile; so
// lines of a later block are fetched. It gained 4 to 7 % of a step that comes from memory.
constexpr int64_t kElementsAhead = 4 * kScaleBlock;

template <typename T>
PADDLE_ASGD_INLINE void fetch_block(const T* x, const T* g, const T* d) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t e = 0; e < kScaleBlock; e += kLine) {
    __builtin_prefetch(g + e);
    __builtin_prefetch(x + e, 1);
    __builtin_prefetch(d + e, 1);
  }
}

template <typename Q, typename T, bool kTheta>
PADDLE_ASGD_INLINE void update_stretch(T* x, const T* g, T* d, Q* y, float* scale, Coefficients<T> c, int64_t length) {
  for_each_block(length, [=](int64_t begin, int64_t count) {
    if (const int64_t ahead = begin + kElementsAhead; ahead < length) fetch_block<T>(x + ahead, g + ahead, d + ahead);
    const BlockScale block = scale_of<Q>(g + begin, count);
    float* own = scale + begin / kScaleBlock;
    update_block<Q, T, kTheta>(x + begin, g + begin, d + begin, y + begin, *own, block, c, count);
    *own = block.scale;
  });
}

// A function template cannot be cloned, so each pair of types gets functions of its own.
#define PADDLE_ASGD_NARROW(name, Q, T)                                                                    \
  PADDLE_ASGD_CLONES void read_##name(const void* y, const float* scale, T* out, int64_t length) {        \
    read_stretch<Q, T>(static_cast<const Q*>(y), scale, out, length);                                     \
  }                                                                                                       \
  PADDLE_ASGD_CLONES void write_##name(const T* g, void* y, float* scale, int64_t length) {               \
    write_stretch<Q, T>(g, static_cast<Q*>(y), scale, length);                                            \
  }                                                                                                       \
  PADDLE_ASGD_CLONES void update_##name(T* x, const T* g, T* d, void* y, float* scale, Coefficients<T> c, \
                                        bool has_theta, int64_t length) {                                 \
    if (has_theta) return update_stretch<Q, T, true>(x, g, d, static_cast<Q*>(y), scale, c, length);      \
    update_stretch<Q, T, false>(x, g, d, static_cast<Q*>(y), scale, c, length);                           \
  }                                                                                                       \
  constexpr NarrowStorage<T> k_##name{read_##name, write_##name, update_##name};
PADDLE_ASGD_NARROW(int16_float32, int16_t, float)
PADDLE_ASGD_NARROW(int8_float32, int8_t, float)
PADDLE_ASGD_NARROW(int16_float64, int16_t, double)
PADDLE_ASGD_NARROW(int8_float64, int8_t, double)
#undef PADDLE_ASGD_NARROW

}  // namespace

const NarrowStorage<float>& narrow_storage(History history, float) {
  return history == History::kInt16 ? k_int16_float32 : k_int8_float32;
}

const NarrowStorage<double>& narrow_storage(History history, double) {
  return history == History::kInt16 ? k_int16_float64 : k_int8_float64;
}

}  // namespace paddle_asgd
