// SPDX-License-Identifier: Apache-2.0
// The step of averaged SGD on the GPU: many tensors in one launch. Must not include Paddle, and must not write the
// formula again (average_formula.h). No allocation, no synchronisation, no copy: a step can be captured.
#include <cstdint>

#include "average_sgd_kernel.h"
#include "cuda_types.h"

namespace paddle_asgd {
namespace {

template <int kBytes>
using AveragedSgdLaunch = Launch<AveragedSgdTensor, AveragedSgdStep, kBytes>;

template <int kCount, typename P, typename G, typename T>
__device__ void update(const AveragedSgdTyped<P, G, T>& t, const AveragedSgdCoefficients<T>& c, int64_t e) {
  const auto g = *reinterpret_cast<const Vector<G, kCount>*>(t.grad + e);
  Vector<T, kCount> x, ax = {};
  Vector<P, kCount> rounded;
  // A 16-bit parameter with a master weight is not read: its value follows from the master, and the bytes are saved.
  if (t.master != nullptr) {
    x = *reinterpret_cast<const Vector<T, kCount>*>(t.master + e);
  } else {
    rounded = *reinterpret_cast<const Vector<P, kCount>*>(t.param + e);
#pragma unroll
    for (int k = 0; k < kCount; ++k) x.at[k] = widen(rounded.at[k]);
  }
  if (t.ax != nullptr) ax = *reinterpret_cast<const Vector<T, kCount>*>(t.ax + e);
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    x.at[k] = descend_averaged<T>(x.at[k], widen(g.at[k]), c);
    narrow(x.at[k], &rounded.at[k]);
  }
  if (t.master != nullptr) *reinterpret_cast<Vector<T, kCount>*>(t.master + e) = x;
  *reinterpret_cast<Vector<P, kCount>*>(t.param + e) = rounded;
  if (t.ax == nullptr) return;
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
    // Without a master weight the steps go by the parameter as it was rounded.
    const T followed = t.master != nullptr ? x.at[k] : static_cast<T>(widen(rounded.at[k]));
    ax.at[k] = average<T>(ax.at[k], followed, c.mu);
  }
  *reinterpret_cast<Vector<T, kCount>*>(t.ax + e) = ax;
}

template <typename P, typename G, typename T>
__device__ bool aligned(const AveragedSgdTyped<P, G, T>& t) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad) |
                         reinterpret_cast<uintptr_t>(t.ax) | reinterpret_cast<uintptr_t>(t.master);
  return bits % 16 == 0;
}

template <typename P, typename G, typename T, int kBytes>
__global__ void __launch_bounds__(kThreads)
    step_tensors(const PADDLE_ASGD_GRID_CONSTANT AveragedSgdLaunch<kBytes> launch) {
  const AveragedSgdStep& step = launch.step;
  if (step.found_inf != nullptr && *step.found_inf) return;
  const int index = find_tensor(launch, blockIdx.x);
  const AveragedSgdTensor& tensor = launch.tensors[index];
  // A power and a few divisions: once for a block.
  __shared__ AveragedSgdCoefficients<T> shared;
  if (!kThreadsWait || threadIdx.x == 0) {
    const double eta = tensor.eta == nullptr ? eta_after(step, *tensor.steps) : kept_eta(tensor, step);
    shared = averaged_sgd_coefficients<T>(tensor, step, eta);
  }
  block_barrier();
  const AveragedSgdCoefficients<T> c = shared;
  const AveragedSgdTyped<P, G, T> t = typed<P, G, T>(tensor);
  constexpr int kCount = 16 / (sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G));
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - launch.first_block[index]) * kChunk;
  const int64_t end = min(begin + kChunk, t.numel);
  int64_t single = begin;
  // A chunk begins at a multiple of every pack, so one test of the tensors' addresses is enough.
  if (aligned(t)) {
    single = begin + (end - begin) / kCount * kCount;
    for (int64_t e = begin + threadIdx.x * kCount; e < single; e += kThreads * kCount) update<kCount>(t, c, e);
  }
  for (int64_t e = single + threadIdx.x; e < end; e += kThreads) update<1>(t, c, e);
}

// A launch of its own: within step_tensors some block might still have to read a clock that another advanced.
template <int kBytes>
__global__ void advance_clocks(const PADDLE_ASGD_GRID_CONSTANT AveragedSgdLaunch<kBytes> launch) {
  const AveragedSgdStep& step = launch.step;
  if (step.found_inf != nullptr && *step.found_inf) return;
  // One block is enough: there is one clock a tensor.
  for (int i = threadIdx.x; i < launch.count; i += blockDim.x) {
    const AveragedSgdTensor& t = launch.tensors[i];
    advance(t, step.eta_dtype, t.eta == nullptr ? 0 : eta_after(step, *t.steps + 1));
  }
}

template <typename P, typename G, typename T, int kBytes>
cudaError_t enqueue(const AveragedSgdLaunch<kBytes>& launch, cudaStream_t stream) {
  const int32_t blocks = launch.first_block[launch.count];
  // No tensor, or none with an element: a launch of no blocks is an error in CUDA.
  if (blocks > 0) step_tensors<P, G, T, kBytes><<<blocks, kThreads, 0, stream>>>(launch);
  // The clocks must not advance over a step that was not taken.
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || launch.count == 0) return error;
  advance_clocks<kBytes><<<1, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace

const char* average_sgd_cuda(const AveragedSgdStep& step, int device, void* stream) {
  return on_device(device, [&]() {
    cudaError_t error = cudaSuccess;
    for (const auto& types : kTypes) {
      if (error != cudaSuccess) return error;
      error = for_each_launch(step, types, [&](const auto& launch) {
        return with_types(types, [&](auto pair) {
          using Pair = decltype(pair);
          return enqueue<typename Pair::P, typename Pair::G, typename Pair::T>(launch,
                                                                               static_cast<cudaStream_t>(stream));
        });
      });
    }
    return error;
  });
}

}  // namespace paddle_asgd
