// SPDX-License-Identifier: Apache-2.0
// The launches of an optimizer's step (cuda_launch.h), sorted by storage types, and what its kernels share that depends
// on them. Must include neither Paddle nor anything of one optimizer.
#pragma once

#include "cuda_launch.h"
#include "half.h"
#include "kernel_arguments.h"

namespace paddle_asgd {

// The pairs of parameter and gradient. A kernel is compiled for each, so a launch holds tensors of one pair.
constexpr DType kTypes[][2] = {{DType::kFloat32, DType::kFloat32},   {DType::kFloat64, DType::kFloat64},
                               {DType::kFloat16, DType::kFloat16},   {DType::kFloat16, DType::kFloat32},
                               {DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32}};

template <typename Tensor>
bool is_of(const Tensor& t, const DType (&types)[2]) {
  return t.param_dtype == types[0] && t.grad_dtype == types[1];
}

// `enqueue` is called with launches of either length, at least once and perhaps with one of no tensor.
template <typename Step, typename Enqueue>
cudaError_t for_each_launch(const Step& step, const DType (&types)[2], const Enqueue& enqueue) {
  return for_each_launch(step.tensors, step, [&](const auto& t) { return is_of(t, types); }, enqueue);
}

// The types of a parameter, of its gradient and of the arithmetic.
template <typename Param, typename Grad, typename Compute>
struct StorageTypes {
  using P = Param;
  using G = Grad;
  using T = Compute;
};

// Calls `call` with the StorageTypes of a pair.
template <typename Call>
cudaError_t with_types(const DType (&types)[2], const Call& call) {
  // No case is the default, so that the compiler warns of a type that is missing.
  const bool grad32 = types[1] == DType::kFloat32;
  switch (types[0]) {
    case DType::kFloat64:
      return call(StorageTypes<double, double, double>());
    case DType::kFloat16:
      return grad32 ? call(StorageTypes<Float16, float, float>()) : call(StorageTypes<Float16, Float16, float>());
    case DType::kBFloat16:
      return grad32 ? call(StorageTypes<BFloat16, float, float>()) : call(StorageTypes<BFloat16, BFloat16, float>());
    case DType::kFloat32:
      break;
  }
  return call(StorageTypes<float, float, float>());
}

// As many elements as fill 16 bytes of the narrowest storage type, loaded and stored in 16-byte accesses.
template <typename S, int kCount>
struct alignas(sizeof(S) * kCount < 16 ? sizeof(S) * kCount : 16) Vector {
  S at[kCount];
};

// The tests run the kernels on the host, one thread after the other, where none can wait for another.
#ifdef __CUDA_ARCH__
constexpr bool kThreadsWait = true;
__device__ inline void block_barrier() { __syncthreads(); }
#else
constexpr bool kThreadsWait = false;
__device__ inline void block_barrier() {}
#endif

}  // namespace paddle_asgd
