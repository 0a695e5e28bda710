// The step on the GPU: many tensors in one launch. Must not include Paddle (so that it builds and runs on its own), and
// must not write the formula again (asgd_formula.h). No allocation, no synchronisation, no copy: a step can be
// captured.
#include <cuda_runtime.h>

#include <cstdint>

#include "asgd_formula.h"
#include "asgd_kernel.h"

namespace paddle_asgd {
namespace {

constexpr int kThreads = 256;
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
constexpr int kMaxTensors = kLargeArguments ? 480 : 56;

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
  int64_t batch_num;
  Scalar learning_rate;
  Scalar weight_decay;
  const bool* found_inf;
};
static_assert(sizeof(Launch) <= (kLargeArguments ? 32764 : 4096), "more than a launch's arguments may hold");

// As many elements as fill 16 bytes of the narrowest storage type, loaded and stored in 16-byte accesses.
template <typename S, int kCount>
struct alignas(sizeof(S) * kCount < 16 ? sizeof(S) * kCount : 16) Vector {
  S at[kCount];
};

// Everything that a block needs of its tensor, in types.
template <typename P, typename G, typename T>
struct Typed {
  P* param;
  const G* grad;
  T* d;
  G* y;
  G* y_i;
  T* master;
  int64_t numel;
  int64_t n;
  Range fresh;
  Coefficients<T> c;

  // Slots outside, elements inside, so that the loads of several slots are under way at once.
  template <int kCount>
  __device__ Vector<T, kCount> refreshed_sum(int64_t e) const {
    double sum[kCount] = {};
    // The slots behind the first are aligned only if a slot is a multiple of a vector.
    const bool vectors = numel % kCount == 0;
#pragma unroll 4
    for (int64_t i = 0; i < n; ++i) {
      const G* y_i = y + i * numel + e;
      Vector<G, kCount> stored;
      if (vectors) {
        stored = *reinterpret_cast<const Vector<G, kCount>*>(y_i);
      } else {
#pragma unroll
        for (int k = 0; k < kCount; ++k) stored.at[k] = y_i[k];
      }
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum[k] += static_cast<double>(widen(stored.at[k]));
    }
    Vector<T, kCount> result;
#pragma unroll
    for (int k = 0; k < kCount; ++k) result.at[k] = static_cast<T>(sum[k]);
    return result;
  }

  template <int kCount>
  __device__ void update(int64_t e) const {
    const auto g = *reinterpret_cast<const Vector<G, kCount>*>(grad + e);
    auto sum = *reinterpret_cast<Vector<T, kCount>*>(d + e);
    auto old = *reinterpret_cast<Vector<G, kCount>*>(y_i + e);
    *reinterpret_cast<Vector<G, kCount>*>(y_i + e) = g;
    Vector<T, kCount> x;
    Vector<P, kCount> rounded;
    if (master != nullptr) {
      x = *reinterpret_cast<Vector<T, kCount>*>(master + e);
    } else {
      rounded = *reinterpret_cast<Vector<P, kCount>*>(param + e);
#pragma unroll
      for (int k = 0; k < kCount; ++k) x.at[k] = widen(rounded.at[k]);
    }
    // A refresh unit is a multiple of every vector's length, so one comparison speaks for all of its elements.
    if (e >= fresh.begin && e < fresh.end) {
      sum = refreshed_sum<kCount>(e);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) sum.at[k] = replace_gradient<T>(sum.at[k], widen(old.at[k]), widen(g.at[k]));
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      x.at[k] = descend<T>(x.at[k], sum.at[k], c);
      narrow(x.at[k], &rounded.at[k]);
    }
    *reinterpret_cast<Vector<T, kCount>*>(d + e) = sum;
    if (master != nullptr) *reinterpret_cast<Vector<T, kCount>*>(master + e) = x;
    *reinterpret_cast<Vector<P, kCount>*>(param + e) = rounded;
  }

  __device__ bool aligned() const {
    const uintptr_t bits = reinterpret_cast<uintptr_t>(param) | reinterpret_cast<uintptr_t>(grad) |
                           reinterpret_cast<uintptr_t>(d) | reinterpret_cast<uintptr_t>(y_i) |
                           reinterpret_cast<uintptr_t>(master);
    return bits % 16 == 0;
  }
};

__device__ int find_tensor(const Launch& launch, int32_t block) {
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

template <typename P, typename G, typename T>
__global__ void __launch_bounds__(kThreads) step_tensors(const PADDLE_ASGD_GRID_CONSTANT Launch launch) {
  if (launch.found_inf != nullptr && *launch.found_inf) return;
  const int index = find_tensor(launch, blockIdx.x);
  const TensorArgs& t = launch.tensors[index];
  const int64_t m = *t.m, n = launch.batch_num;
  G* y = static_cast<G*>(t.y);
  const Typed<P, G, T> typed{static_cast<P*>(t.param),
                             static_cast<const G*>(t.grad),
                             static_cast<T*>(t.d),
                             y,
                             y + slot_of_step(m, n) * t.numel,
                             static_cast<T*>(t.master),
                             t.numel,
                             n,
                             refresh_range(m, n, t.numel),
                             coefficients<T>(load(launch.learning_rate), load(launch.weight_decay), m, n)};
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - launch.first_block[index]) * kChunk;
  const int64_t end = min(begin + kChunk, t.numel);
  constexpr int kNarrowest = sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G);
  constexpr int kCount = 16 / kNarrowest;
  int64_t scalar_begin = begin;
  if (typed.aligned()) {
    scalar_begin = begin + (end - begin) / kCount * kCount;
    for (int64_t e = begin + threadIdx.x * kCount; e < scalar_begin; e += kThreads * kCount) {
      typed.template update<kCount>(e);
    }
  }
  for (int64_t e = scalar_begin + threadIdx.x; e < end; e += kThreads) typed.template update<1>(e);
}

// A launch of its own: within step_tensors some block might still have to read a counter that another advanced.
__global__ void advance_counters(const PADDLE_ASGD_GRID_CONSTANT Launch launch) {
  if (launch.found_inf != nullptr && *launch.found_inf) return;
  for (int t = threadIdx.x; t < launch.count; t += blockDim.x) {
    *launch.tensors[t].m = next_step(*launch.tensors[t].m);
  }
}

template <typename P, typename G, typename T>
cudaError_t enqueue(const Launch& launch, cudaStream_t stream) {
  const int32_t blocks = launch.first_block[launch.count];
  // No tensor, or none with an element: a launch of no blocks is an error in CUDA.
  if (blocks > 0) step_tensors<P, G, T><<<blocks, kThreads, 0, stream>>>(launch);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || launch.count == 0) return error;
  advance_counters<<<1, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

cudaError_t enqueue(const Launch& launch, DType param, DType grad, cudaStream_t stream) {
  const bool grad32 = grad == DType::kFloat32;
  switch (param) {
    case DType::kFloat64:
      return enqueue<double, double, double>(launch, stream);
    case DType::kFloat16:
      return grad32 ? enqueue<Float16, float, float>(launch, stream) : enqueue<Float16, Float16, float>(launch, stream);
    case DType::kBFloat16:
      return grad32 ? enqueue<BFloat16, float, float>(launch, stream)
                    : enqueue<BFloat16, BFloat16, float>(launch, stream);
    case DType::kFloat32:
      break;
  }
  return enqueue<float, float, float>(launch, stream);
}

// Packs the tensors of one pair of storage types and launches whenever the arguments are full and, behind the loop,
// for what is left: an empty tensor at the end of the list must not swallow the work packed before it.
cudaError_t step_of_types(const StepArgs& step, DType param, DType grad, cudaStream_t stream) {
  Launch launch;
  launch.count = 0;
  launch.first_block[0] = 0;
  launch.batch_num = step.batch_num;
  launch.learning_rate = step.learning_rate;
  launch.weight_decay = step.weight_decay;
  launch.found_inf = step.found_inf;
  for (int64_t i = 0; i < step.count; ++i) {
    const TensorArgs& t = step.tensors[i];
    if (t.param_dtype != param || t.grad_dtype != grad) continue;
    const int64_t blocks = (t.numel + kChunk - 1) / kChunk;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    if (launch.count == kMaxTensors || launch.first_block[launch.count] + blocks > INT32_MAX) {
      const cudaError_t error = enqueue(launch, param, grad, stream);
      if (error != cudaSuccess) return error;
      launch.count = 0;
    }
    // An empty tensor gets no block, but its counter advances like that of every other.
    launch.tensors[launch.count] = t;
    launch.first_block[launch.count + 1] = launch.first_block[launch.count] + static_cast<int32_t>(blocks);
    ++launch.count;
  }
  return enqueue(launch, param, grad, stream);
}

}  // namespace

const char* asgd_cuda(const StepArgs& step, int device, void* stream) {
  int previous = 0;
  // Cleared, for an error that somebody else left behind would be taken for that of a launch. A lasting one comes
  // again.
  cudaGetLastError();
  cudaError_t error = cudaSuccess;
  error = cudaGetDevice(&previous);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  constexpr DType kTypes[][2] = {{DType::kFloat32, DType::kFloat32},   {DType::kFloat64, DType::kFloat64},
                                 {DType::kFloat16, DType::kFloat16},   {DType::kFloat16, DType::kFloat32},
                                 {DType::kBFloat16, DType::kBFloat16}, {DType::kBFloat16, DType::kFloat32}};
  for (const auto& types : kTypes) {
    if (error == cudaSuccess) error = step_of_types(step, types[0], types[1], static_cast<cudaStream_t>(stream));
  }
  cudaSetDevice(previous);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace paddle_asgd
