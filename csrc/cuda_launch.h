// SPDX-License-Identifier: Apache-2.0
// Many tensors in one launch: packs them into a kernel's arguments, and finds a block's tensor there. Includes CUDA,
// and must include neither Paddle nor anything of one optimizer.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace paddle_asgd {

// The elements of one tensor that one block updates. They are few enough to balance tensors of very different sizes,
// and enough to pay for the search of the tensor.
constexpr int64_t kChunk = 4096;
// The threads of a block, in every kernel that works on elements.
constexpr int kThreads = 256;

// The tensors of a launch travel as its argument: no copy to the device, nothing to keep alive. CUDA 12.1 raised the
// limit on arguments from 4 KiB to 32,764 bytes for Volta and later.
#if CUDART_VERSION >= 12010 && defined(__CUDA_ARCH_LIST__)
constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
constexpr bool large_arguments() {
  for (const int architecture : kArchitectures) {
    if (architecture < 700) return false;
  }
  return true;
}
constexpr bool kLargeArguments = large_arguments();
#else
constexpr bool kLargeArguments = false;
#endif
// A launch copies all bytes of its arguments, however few tensors it has, so short lists take short arguments.
constexpr int kShortArguments = 4096;
constexpr int kLongArguments = kLargeArguments ? 32764 : kShortArguments;
constexpr int kOtherArguments = 64;  // what a kernel may take besides its launch

// This tells the compiler that the argument is never written, so that each thread need not copy it to index it.
#if CUDART_VERSION >= 11070 && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700)
#define PADDLE_ASGD_GRID_CONSTANT __grid_constant__
#else
#define PADDLE_ASGD_GRID_CONSTANT
#endif

// Tensors that fit into kBytes of arguments. An optimizer says what `Tensor` and `Step` are; of a tensor this file
// reads `numel`, and of a step `count`.
template <typename Tensor, typename Step, int kBytes>
struct Launch {
  // Each tensor takes its own bytes and its first block. The 16 bytes are one more block, `count`, `last` and padding.
  static constexpr int kCapacity = (kBytes - kOtherArguments - static_cast<int>(sizeof(Step)) - 16) /
                                   static_cast<int>(sizeof(Tensor) + sizeof(int32_t));

  Tensor tensors[kCapacity];
  // Blocks first_block[t] to first_block[t + 1] work on tensor t; what lies behind the last tensor is not read.
  int32_t first_block[kCapacity + 1];
  int32_t count;
  bool last;  // of the step
  Step step;  // its list of tensors is the host's and must not be read
};

template <typename Tensor, typename Step, int kBytes>
__device__ int find_tensor(const Launch<Tensor, Step, kBytes>& launch, int32_t block) {
  int low = 0, high = launch.count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (launch.first_block[middle] <= block) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// Adds a tensor to the launch; returns false, and changes nothing, if there is no room for it.
template <typename Tensor, typename Step, int kBytes>
bool pack(const Tensor& t, int64_t blocks, Launch<Tensor, Step, kBytes>* launch) {
  if (launch->count == launch->kCapacity || launch->first_block[launch->count] + blocks > INT32_MAX) return false;
  // An empty tensor gets no block, but its clock advances like that of every other.
  launch->tensors[launch->count] = t;
  launch->first_block[launch->count + 1] = launch->first_block[launch->count] + static_cast<int32_t>(blocks);
  ++launch->count;
  return true;
}

// Enqueues a full list as it is, and one that is short enough in short arguments.
template <typename Tensor, typename Step, int kBytes, typename Enqueue>
cudaError_t enqueue_fitting(const Launch<Tensor, Step, kBytes>& launch, const Enqueue& enqueue) {
  using Short = Launch<Tensor, Step, kShortArguments>;
  static_assert(sizeof(launch) <= kBytes - kOtherArguments, "more than a launch's arguments may hold");
  if constexpr (kBytes > kShortArguments) {
    if (launch.count <= Short::kCapacity) {
      Short copy;
      for (int t = 0; t < launch.count; ++t) copy.tensors[t] = launch.tensors[t];
      for (int t = 0; t <= launch.count; ++t) copy.first_block[t] = launch.first_block[t];
      copy.count = launch.count;
      copy.last = launch.last;
      copy.step = launch.step;
      return enqueue_fitting(copy, enqueue);
    }
  }
  return enqueue(launch);
}

// Packs the tensors that `belongs` takes, and enqueues whenever the arguments are full. What is left is enqueued behind
// the loop and not at the last tensor, which may be empty or not belong. `enqueue` is called with launches of both
// lengths.
template <typename Tensor, typename Step, typename Belongs, typename Enqueue>
cudaError_t for_each_launch(const Tensor* tensors, const Step& step, const Belongs& belongs, const Enqueue& enqueue) {
  Launch<Tensor, Step, kLongArguments> launch;
  launch.count = 0;
  launch.first_block[0] = 0;
  launch.last = false;
  launch.step = step;
  for (int64_t i = 0; i < step.count; ++i) {
    const Tensor& t = tensors[i];
    if (!belongs(t)) continue;
    const int64_t blocks = (t.numel + kChunk - 1) / kChunk;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (pack(t, blocks, &launch)) continue;
    const cudaError_t error = enqueue_fitting(launch, enqueue);
    if (error != cudaSuccess) return error;
    launch.count = 0;
    pack(t, blocks, &launch);
  }
  launch.last = launch.count > 0 && belongs(tensors[step.count - 1]);
  return enqueue_fitting(launch, enqueue);
}

// Runs on `device`, whichever was current, and says in CUDA's words what went wrong.
template <typename Enqueue>
const char* on_device(int device, const Enqueue& enqueue) {
  int previous = 0;
  // An error that somebody else left behind is cleared, because it would be taken for that of a launch. A lasting one
  // comes again.
  cudaGetLastError();
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = enqueue();
  cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace paddle_asgd
