// SPDX-License-Identifier: Apache-2.0
// The norm of the known gradient on the GPU. Must not include Paddle, nor write to a tensor, allocate, wait or copy.
#include <cstdint>

#include "asgd_launch.h"
#include "asgd_step.h"

namespace paddle_asgd {
namespace {

// As many blocks as keep the memory busy, and no more, because each warp adds once to the one sum. The order of these
// additions differs from run to run; no step depends on the norm.
constexpr int32_t kNormBlocks = 1024;

// All threads of a warp must come here, or the shuffle is undefined. If each thread added its own sum, all of them
// would queue for the one address.
__device__ inline void add_of_warp(double* total, double value) {
// On the host the tests run one thread after the other, which have no warp to shuffle in.
#ifdef __CUDA_ARCH__
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_down_sync(0xffffffffu, value, lane);
  if (threadIdx.x % 32 != 0) return;
#endif
  atomicAdd(total, value);
}

template <typename P, typename T, int kBytes>
__global__ void add_squares(const PADDLE_ASGD_GRID_CONSTANT AsgdLaunch<kBytes> launch, double* total) {
  const StepArgs& step = launch.step;
  // The number is loaded here, because the host may not know it.
  const double weight_decay = load(step.weight_decay);
  double sum = 0;
  // All threads of a block stay together, `continue` included, as add_of_warp() needs it.
  for (int32_t block = blockIdx.x; block < launch.first_block[launch.count]; block += kNormBlocks) {
    const int index = find_tensor(launch, block);
    const TensorArgs& t = launch.tensors[index];
    const double known = weight_known(t.m, step.batch_index.given, step.batch_num, step.batch_weights);
    if (known == 0) continue;  // no gradient has ever reached it
    const int64_t begin = (static_cast<int64_t>(block) - launch.first_block[index]) * kChunk;
    const int64_t end = min(begin + kChunk, t.numel);
    for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) {
      // The master weight is the parameter; a 16-bit one beside it is only its rounded copy.
      const T x = t.master == nullptr ? widen(static_cast<const P*>(t.param)[e]) : static_cast<const T*>(t.master)[e];
      const double gradient = known_gradient<T>(x, static_cast<const T*>(t.d)[e], weight_decay, known);
      sum += gradient * gradient;
    }
  }
  add_of_warp(total, sum);
}

template <typename P, typename T, int kBytes>
cudaError_t enqueue_norm(const AsgdLaunch<kBytes>& launch, double* sum, cudaStream_t stream) {
  const int32_t blocks = launch.first_block[launch.count];
  // A launch of no blocks is an error in CUDA.
  if (blocks > 0) add_squares<P, T, kBytes><<<min(blocks, kNormBlocks), kThreads, 0, stream>>>(launch, sum);
  return cudaGetLastError();
}

template <int kBytes>
cudaError_t enqueue_norm(const AsgdLaunch<kBytes>& launch, DType param, double* sum, cudaStream_t stream) {
  switch (param) {
    case DType::kFloat64:
      return enqueue_norm<double, double>(launch, sum, stream);
    case DType::kFloat16:
      return enqueue_norm<Float16, float>(launch, sum, stream);
    case DType::kBFloat16:
      return enqueue_norm<BFloat16, float>(launch, sum, stream);
    case DType::kFloat32:
      break;
  }
  return enqueue_norm<float, float>(launch, sum, stream);
}

}  // namespace

const char* asgd_norm_cuda(const StepArgs& step, double* sum, int device, void* stream) {
  return on_device(device, [&]() {
    cudaError_t error = cudaSuccess;
    // The order of the launches does not matter: each adds to the same sum.
    for (const auto& types : kTypes) {
      if (error != cudaSuccess) return error;
      error = for_each_launch(step, types, [&](const auto& launch) {
        return enqueue_norm(launch, types[0], sum, static_cast<cudaStream_t>(stream));
      });
    }
    return error;
  });
}

}  // namespace paddle_asgd
