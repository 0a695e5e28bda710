// SPDX-License-Identifier: Apache-2.0
// The floor of a step: moves the bytes that a step must move, packed into launches and chunks as the step is, and
// computes nothing. Everything but the history is written as it was. Must not know the formula.
#pragma once

#include "asgd_launch.h"
#include "fill.h"

namespace gpu {

using paddle_asgd::AsgdLaunch;

// 16 bytes of the gradient at a time, and as many of what is kRatio times as wide. `none` is 0, which the compiler does
// not know.
template <int kRatio, bool kMaster, int kBytes>
__global__ void __launch_bounds__(kThreads)
    move_bytes(const PADDLE_ASGD_GRID_CONSTANT AsgdLaunch<kBytes> launch, int64_t slot, uint32_t none) {
  using paddle_asgd::kChunk;
  const int index = find_tensor(launch, blockIdx.x);
  const paddle_asgd::TensorArgs& t = launch.tensors[index];
  constexpr int kCount = 4 * kRatio;  // elements in 16 bytes
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - launch.first_block[index]) * kChunk;
  const int64_t end = min(begin + kChunk, t.numel) / kCount;
  uint4* d = static_cast<uint4*>(t.d);
  uint4* master = static_cast<uint4*>(t.master);
  uint4* param = static_cast<uint4*>(t.param);
  // A slot that does not begin at 16 bytes is moved as if it did.
  uint4* y_i = static_cast<uint4*>(t.y) + slot * t.numel / kCount;
  for (int64_t v = begin / kCount + threadIdx.x; v < end; v += kThreads) {
    const uint4 g = static_cast<const uint4*>(t.grad)[v], old = y_i[v];
    uint4 sum[kRatio], x[kRatio];
#pragma unroll
    for (int k = 0; k < kRatio; ++k) sum[k] = d[kRatio * v + k];
#pragma unroll
    for (int k = 0; k < (kMaster ? kRatio : 1); ++k) x[k] = kMaster ? master[kRatio * v + k] : param[v];
    y_i[v] = g;
#pragma unroll
    for (int k = 0; k < kRatio; ++k) {
      sum[k].x ^= old.x & none;
      d[kRatio * v + k] = sum[k];
    }
#pragma unroll
    for (int k = 0; k < (kMaster ? kRatio : 0); ++k) master[kRatio * v + k] = x[k];
    x[0].x ^= old.y & none;
    param[v] = x[0];
  }
}

template <int kBytes>
cudaError_t enqueue_floor(const AsgdLaunch<kBytes>& launch, int64_t slot, cudaStream_t stream) {
  const int blocks = launch.first_block[launch.count];
  if (launch.tensors[0].master != nullptr) {
    move_bytes<2, true, kBytes><<<blocks, kThreads, 0, stream>>>(launch, slot, 0u);
  } else {
    move_bytes<1, false, kBytes><<<blocks, kThreads, 0, stream>>>(launch, slot, 0u);
  }
  return cudaGetLastError();
}

// As asgd_cuda: enqueues on `stream`. Tensors of float32, or of 16 bits with master weights.
inline cudaError_t enqueue_floor(const paddle_asgd::StepArgs& step, int64_t slot, cudaStream_t stream) {
  const paddle_asgd::DType types[2] = {step.tensors[0].param_dtype, step.tensors[0].grad_dtype};
  return for_each_launch(step, types, [&](const auto& launch) { return enqueue_floor(launch, slot, stream); });
}

}  // namespace gpu
