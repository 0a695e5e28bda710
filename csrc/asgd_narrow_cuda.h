// SPDX-License-Identifier: Apache-2.0
// What the warps of one block do to the elements of a tensor with a narrow history, for asgd_step_cuda.cu. Must not
// launch anything, say how a number is stored (block_scale.h), nor write the formula again (asgd_formula.h).
#pragma once

#include <cstdint>

#include "asgd_launch.h"
#include "asgd_step.h"
#include "block_scale.h"

namespace paddle_asgd {
namespace {

constexpr int kLanes = 32;
constexpr int kOfLane = kScaleBlock / kLanes;  // elements, each kLanes behind the one before
static_assert(kOfLane * kLanes == kScaleBlock, "a warp takes a block of scales");

// Calls `call` with the lanes that this thread stands for: its own. On the host, where the tests run one thread after
// the other, none could learn what a later one finds; the first of a warp stands for all of them there.
template <typename Call>
__device__ void for_own_lanes(const Call& call) {
  const int own = static_cast<int>(threadIdx.x) % kLanes;
  if constexpr (kThreadsWait) {
    call(own);
  } else {
    for (int lane = 0; own == 0 && lane < kLanes; ++lane) call(lane);
  }
}

// All lanes of a warp must come here together.
__device__ inline uint32_t largest_of_warp(uint32_t bits) {
#ifdef __CUDA_ARCH__
  for (int lane = kLanes / 2; lane > 0; lane /= 2) bits = max(bits, __shfl_xor_sync(0xffffffffu, bits, lane));
#endif
  return bits;
}

__device__ inline void warp_barrier() {
#ifdef __CUDA_ARCH__
  __syncwarp();
#endif
}

// The narrow history of one tensor: stored numbers of type Q, and what a step needs beside Typed.
template <typename Q, typename P, typename G, typename T>
struct NarrowWork {
  Typed<P, G, T> t;
  Q* y;
  float* scale;
  int64_t slot;
  int64_t n;
  const double* weights;
  bool has_theta;
  Range fresh;
  Coefficients<T> c;

  // The sum is in double and in the order of the slots, as on the CPU.
  __device__ T refreshed_sum(int64_t e) const {
    const int64_t blocks = scale_blocks(t.numel);
    double sum = 0;
#pragma unroll 4
    for (int64_t i = 0; i < n; ++i) {
      const T stored = from_stored<T>(y[i * t.numel + e], scale[i * blocks + e / kScaleBlock]);
      const double number = static_cast<double>(stored);
      sum += weights == nullptr ? number : static_cast<double>(static_cast<T>(weights[i])) * number;
    }
    return static_cast<T>(sum);
  }

  // The elements of one lane, once the scale of their block is known. All loads come before the first store, because
  // the compiler may not move a load before a store that might change what it reads.
  __device__ void update(int64_t first, int64_t end, float old_scale, BlockScale block, bool is_fresh) const {
    Q* y_i = y + slot * t.numel;
    T g[kOfLane], old[kOfLane], d[kOfLane], x[kOfLane];
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) {
      const int64_t e = first + k * kLanes;
      if (e >= end) continue;
      g[k] = widen(t.grad[e]);
      old[k] = from_stored<T>(y_i[e], old_scale);
      d[k] = t.d[e];
      x[k] = t.master == nullptr ? widen(t.param[e]) : t.master[e];
    }
#pragma unroll
    for (int k = 0; k < kOfLane; ++k) {
      const int64_t e = first + k * kLanes;
      if (e >= end) continue;
      const Q q = to_stored<Q>(to_scaled(g[k]), block.inverse);
      y_i[e] = q;
      // d takes what is stored, so that it stays the sum of that. With a theta x also takes the gradient itself.
      const T sum =
          is_fresh ? refreshed_sum(e) : replace_gradient<T>(d[k], old[k], from_stored<T>(q, block.scale), c.weight);
      const T moved = has_theta ? descend_theta<T>(x[k], d[k], old[k], g[k], c) : descend<T>(x[k], sum, c);
      t.d[e] = sum;
      if (t.master != nullptr) t.master[e] = moved;
      narrow(moved, &t.param[e]);
    }
  }

  // All lanes of a warp must come here together.
  __device__ void update_block(int64_t block) const {
    const int64_t begin = block * kScaleBlock, end = min(begin + kScaleBlock, t.numel);
    float* own = scale + slot * scale_blocks(t.numel) + block;
    const float old_scale = *own;
    uint32_t bits = 0;
    for_own_lanes([&](int lane) {
#pragma unroll
      for (int k = 0; k < kOfLane; ++k) {
        const int64_t e = begin + k * kLanes + lane;
        if (e < end) bits = max(bits, magnitude_bits(to_scaled(widen(t.grad[e]))));
      }
    });
    const BlockScale found = block_scale<Q>(largest_of_warp(bits));
    // Every lane has read the old scale before it is overwritten, and reads the one behind the barrier in a sum.
    warp_barrier();
    if (threadIdx.x % kLanes == 0) *own = found.scale;
    warp_barrier();
    // A refresh unit is a multiple of a block, so its first element speaks for all of it.
    const bool is_fresh = begin >= fresh.begin && begin < fresh.end;
    for_own_lanes([&](int lane) { update(begin + lane, end, old_scale, found, is_fresh); });
  }

  // The blocks of scales of [begin, end), one warp after the other.
  __device__ void update_range(int64_t begin, int64_t end) const {
    const int64_t last = scale_blocks(end);
#pragma unroll 1
    for (int64_t b = begin / kScaleBlock + threadIdx.x / kLanes; b < last; b += kThreads / kLanes) update_block(b);
  }
};

}  // namespace
}  // namespace paddle_asgd
