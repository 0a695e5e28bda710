// SPDX-License-Identifier: Apache-2.0
// Memory full of finite numbers that any dtype can be read from, the same on host and device. Must not know what they
// are for.
#pragma once

#include <cstdint>

#include "half.h"

namespace gpu {

constexpr int kThreads = 256;

// The upper half of a float32, or a bfloat16, of either sign and of magnitudes from 2^-15 to 1; as a float16, below 2.
PADDLE_ASGD_HOST_DEVICE uint16_t number_at(int64_t e, uint64_t seed) {
  uint64_t z = (static_cast<uint64_t>(e) + seed * 0x632be59bd9b4e019u) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z ^= z >> 27;
  return static_cast<uint16_t>((z & 0x807fu) | ((0x70u + ((z >> 20) & 0xfu)) << 7));
}

// A template, for there is no inline kernel.
template <typename Number>
__global__ void fill(Number* memory, int64_t count, uint64_t seed) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e < count) memory[e] = number_at(e, seed);
}

inline void fill_on_device(void* memory, int64_t count, uint64_t seed, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  fill<uint16_t><<<blocks, kThreads, 0, stream>>>(static_cast<uint16_t*>(memory), count, seed);
  CUDA(cudaGetLastError());
}

}  // namespace gpu
