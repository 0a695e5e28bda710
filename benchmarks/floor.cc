// SPDX-License-Identifier: Apache-2.0
// The floor of a step: moves the bytes that a step must move and computes nothing. Must not know the formula of SAG.
//
// It works on the memory of a real optimizer: the same addresses, pages and number of tensors. Gradients are constant
// while timing, so a slot holds the gradient already, `change` is 0, and everything that is written is what was there;
// the compiler cannot know. (A parameter with a master weight gets rubbish, which its next step overwrites unread.)
#include <cstdint>

#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__)
#define CLONES
#elif __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

struct Tensor {
  void* param;
  const void* grad;
  uint32_t* d;
  void* y;
  uint32_t* master;
  uint32_t* scale;  // of a narrow history, else null
  int64_t numel;
  int64_t item;  // bytes of an element of y
};

namespace {

CLONES void move_float32(uint32_t* __restrict__ param, const uint32_t* __restrict__ grad, uint32_t* __restrict__ d,
                         uint32_t* __restrict__ y_i, int64_t numel) {
  for (int64_t e = 0; e < numel; ++e) {
    const uint32_t change = y_i[e] ^ grad[e];
    d[e] ^= change;
    param[e] ^= change;
    y_i[e] = grad[e];
  }
}

CLONES void move_16_bit(uint16_t* __restrict__ param, const uint16_t* __restrict__ grad, uint32_t* __restrict__ d,
                        uint16_t* __restrict__ y_i, uint32_t* __restrict__ master, int64_t numel) {
  for (int64_t e = 0; e < numel; ++e) {
    const uint32_t change = y_i[e] ^ grad[e];
    d[e] ^= change;
    master[e] ^= change;
    param[e] = static_cast<uint16_t>(master[e] >> 16);
    y_i[e] = grad[e];
  }
}

constexpr int64_t kBlock = 128;  // the elements that share a scale

// What is stored is not the gradient, so `none`, which is 0, makes the change; the compiler cannot know that either.
template <typename Q>
inline void move_block(uint32_t* __restrict__ param, const uint32_t* __restrict__ grad, uint32_t* __restrict__ d,
                       Q* __restrict__ y_i, uint32_t* __restrict__ scale, uint32_t none, int64_t length) {
  *scale ^= none;
  for (int64_t e = 0; e < length; ++e) {
    const uint32_t change = (static_cast<uint32_t>(y_i[e]) ^ grad[e]) & none;
    d[e] ^= change;
    param[e] ^= change;
    y_i[e] = static_cast<Q>(y_i[e] ^ change);
  }
}

CLONES void move_int16(uint32_t* param, const uint32_t* grad, uint32_t* d, uint16_t* y_i, uint32_t* scale,
                       uint32_t none, int64_t numel) {
  for (int64_t e = 0; e < numel; e += kBlock) {
    move_block(param + e, grad + e, d + e, y_i + e, scale + e / kBlock, none, numel - e < kBlock ? numel - e : kBlock);
  }
}

CLONES void move_int8(uint32_t* param, const uint32_t* grad, uint32_t* d, uint8_t* y_i, uint32_t* scale, uint32_t none,
                      int64_t numel) {
  for (int64_t e = 0; e < numel; e += kBlock) {
    move_block(param + e, grad + e, d + e, y_i + e, scale + e / kBlock, none, numel - e < kBlock ? numel - e : kBlock);
  }
}

CLONES void move_average(float* __restrict__ average, const float* __restrict__ value, float weight, int64_t numel) {
  for (int64_t e = 0; e < numel; ++e) average[e] += weight * (value[e] - average[e]);
}

}  // namespace

// What an update of averages cannot do without, in one pass: `param` is read, and `d`, a float32, is read and written.
extern "C" void move_averages(const Tensor* tensors, int64_t count, float weight) {
  for (const Tensor* t = tensors; t < tensors + count; ++t) {
    move_average(reinterpret_cast<float*>(t->d), static_cast<const float*>(t->param), weight, t->numel);
  }
}

// What a swap cannot do without, twice: both are read and written.
extern "C" void exchange_bytes(const Tensor* tensors, int64_t count) {
  for (const Tensor* t = tensors; t < tensors + count; ++t) {
    uint32_t *a = t->d, *b = static_cast<uint32_t*>(t->param);
    for (int64_t e = 0; e < t->numel; ++e) {
      const uint32_t kept = a[e];
      a[e] = b[e];
      b[e] = kept;
    }
  }
}

extern "C" void move_bytes(const Tensor* tensors, int64_t count, int64_t slot, uint32_t none) {
  for (const Tensor* t = tensors; t < tensors + count; ++t) {
    if (t->scale != nullptr) {
      uint32_t *param = static_cast<uint32_t*>(t->param), *scale = t->scale + slot * ((t->numel + kBlock - 1) / kBlock);
      const uint32_t* grad = static_cast<const uint32_t*>(t->grad);
      if (t->item == 1) {
        move_int8(param, grad, t->d, static_cast<uint8_t*>(t->y) + slot * t->numel, scale, none, t->numel);
      } else {
        move_int16(param, grad, t->d, static_cast<uint16_t*>(t->y) + slot * t->numel, scale, none, t->numel);
      }
    } else if (t->master == nullptr) {
      move_float32(static_cast<uint32_t*>(t->param), static_cast<const uint32_t*>(t->grad), t->d,
                   static_cast<uint32_t*>(t->y) + slot * t->numel, t->numel);
    } else {
      move_16_bit(static_cast<uint16_t*>(t->param), static_cast<const uint16_t*>(t->grad), t->d,
                  static_cast<uint16_t*>(t->y) + slot * t->numel, t->master, t->numel);
    }
  }
}
