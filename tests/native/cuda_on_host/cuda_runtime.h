// SPDX-License-Identifier: Apache-2.0
// As much of CUDA as the kernels use, on the host: every thread of every block runs to its end, one after the other.
// Serves to check indices, alignment and order of the kernel where no GPU is. Must not be on the path of a real build.
#pragma once

#include <algorithm>

// Launches of both lengths, unless a test asks for an older CUDA.
#ifndef CUDART_VERSION
#define CUDART_VERSION 12010
#endif
#define __CUDA_ARCH_LIST__ 900

#define __device__
#define __global__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidConfiguration = 9;

struct HostIndex {
  unsigned x;
};
inline HostIndex blockIdx, threadIdx, blockDim;
using std::max;
using std::min;

inline double atomicAdd(double* address, double value) {
  const double before = *address;
  *address += value;
  return before;
}

inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an error"; }

// What test_sanitizers.py puts in the place of kernel<<<blocks, threads, 0, stream>>>(argument). Last block and thread
// first: CUDA promises no order, and a race would show.
template <typename... Parameters, typename... Arguments>
void launch_on_host(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t,
                    const Arguments&... arguments) {
  blockDim.x = threads;
  for (blockIdx.x = blocks; blockIdx.x-- > 0;) {
    for (threadIdx.x = threads; threadIdx.x-- > 0;) kernel(arguments...);
  }
}
