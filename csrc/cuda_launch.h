// SPDX-License-Identifier: Apache-2.0
// Many tensors in one launch: packs them into a kernel's arguments, and finds a block's tensor there. Includes CUDA,
// and must include neither Paddle nor the formula.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "asgd_kernel.h"

namespace paddle_asgd {

// Elements of one tensor that one block updates. Small enough to balance tensors of very different sizes, large enough
// to pay for the search of the tensor.
constexpr int64_t kChunk = 4096;

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
constexpr int kMaxTensors = kLargeArguments ? 478 : 56;

// Tells the compiler that the argument is never written, so that it need not be copied to be indexed.
#if CUDART_VERSION >= 11070 && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700)
#define PADDLE_ASGD_GRID_CONSTANT __grid_constant__
#else
#define PADDLE_ASGD_GRID_CONSTANT
#endif

struct Launch {
  TensorArgs tensors[kMaxTensors];
  // Blocks first_block[t] to first_block[t + 1] work on tensor t; what lies behind the last tensor is not read.
  int32_t first_block[kMaxTensors + 1];
  int32_t count;
  bool last;      // of the step
  StepArgs step;  // its list of tensors is the host's and must not be read
};
static_assert(sizeof(Launch) <= (kLargeArguments ? 32764 : 4096), "more than a launch's arguments may hold");

inline __device__ int find_tensor(const Launch& launch, int32_t block) {
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

constexpr DType kTypes[][2] = {{DType::kFloat32, DType::kFloat32},   {DType::kFloat64, DType::kFloat64},
                               {DType::kFloat16, DType::kFloat16},   {DType::kFloat16, DType::kFloat32},
                               {DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32}};

inline bool is_of(const TensorArgs& t, const DType (&types)[2]) {
  return t.param_dtype == types[0] && t.grad_dtype == types[1];
}

// Adds a tensor to the launch; false if there is no room for it.
inline bool pack(const TensorArgs& t, int64_t blocks, Launch* launch) {
  if (launch->count == kMaxTensors || launch->first_block[launch->count] + blocks > INT32_MAX) return false;
  // An empty tensor gets no block, but its clock advances like that of every other.
  launch->tensors[launch->count] = t;
  launch->first_block[launch->count + 1] = launch->first_block[launch->count] + static_cast<int32_t>(blocks);
  ++launch->count;
  return true;
}

// Packs the tensors of one pair of storage types and enqueues whenever the arguments are full and, behind the loop,
// for what is left: an empty tensor at the end of the list must not swallow the work packed before it.
template <typename Enqueue>
cudaError_t for_each_launch(const StepArgs& step, const DType (&types)[2], const Enqueue& enqueue) {
  Launch launch;
  launch.count = 0;
  launch.first_block[0] = 0;
  launch.last = false;
  launch.step = step;
  for (int64_t i = 0; i < step.count; ++i) {
    const TensorArgs& t = step.tensors[i];
    if (!is_of(t, types)) continue;
    const int64_t blocks = (t.numel + kChunk - 1) / kChunk;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (pack(t, blocks, &launch)) continue;
    const cudaError_t error = enqueue(launch);
    if (error != cudaSuccess) return error;
    launch.count = 0;
    pack(t, blocks, &launch);
  }
  launch.last = launch.count > 0 && is_of(step.tensors[step.count - 1], types);
  return enqueue(launch);
}

// Runs on `device`, whichever was current, and says in CUDA's words what went wrong.
template <typename Enqueue>
const char* on_device(int device, const Enqueue& enqueue) {
  int previous = 0;
  // Cleared, for an error that somebody else left behind would be taken for that of a launch. A lasting one comes
  // again.
  cudaGetLastError();
  cudaError_t error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  error = enqueue();
  cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace paddle_asgd
