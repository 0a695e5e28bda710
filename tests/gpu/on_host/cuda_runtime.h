// SPDX-License-Identifier: Apache-2.0
// As much of CUDA as the programs here use, on the host: memory is the host's, streams run at once, and a captured
// graph is a list of launches to run again. Serves to try the programs where no GPU is; says nothing about a GPU.
#pragma once

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

struct uint4 {
  unsigned x, y, z, w;
};

#define launch_on_host launch_at_once
#include "../../native/cuda_on_host/cuda_runtime.h"
#undef launch_on_host

constexpr cudaError_t cudaErrorMemoryAllocation = 2;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };

inline cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  return *memory == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) { return std::free(memory), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
inline cudaError_t cudaMemset(void* memory, int value, size_t bytes) {
  return std::memset(memory, value, bytes), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(memory, value, bytes);
}
inline cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = size_t{1} << 32, cudaSuccess; }
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = nullptr, cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// ---- Events --------------------------------------------------------------------------------------------------------

using cudaEvent_t = std::chrono::steady_clock::time_point*;
inline cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return *event = new std::chrono::steady_clock::time_point, cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete event, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t) {
  return *event = std::chrono::steady_clock::now(), cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  return *ms = std::chrono::duration<float, std::milli>(*end - *begin).count(), cudaSuccess;
}

// ---- Graphs --------------------------------------------------------------------------------------------------------

struct HostGraph {
  std::vector<std::function<void()>> launches;
};
using cudaGraph_t = HostGraph*;
using cudaGraphExec_t = HostGraph*;
using cudaGraphNode_t = size_t;
enum cudaGraphNodeType { cudaGraphNodeTypeKernel };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal };

inline HostGraph* capturing = nullptr;

inline cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  return capturing = new HostGraph, cudaSuccess;
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  *graph = capturing;
  return capturing = nullptr, cudaSuccess;
}
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* run, cudaGraph_t graph, unsigned long long) {
  return *run = new HostGraph(*graph), cudaSuccess;
}
inline cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  *count = graph->launches.size();
  for (size_t i = 0; nodes != nullptr && i < *count; ++i) nodes[i] = i;
  return cudaSuccess;
}
inline cudaError_t cudaGraphNodeGetType(cudaGraphNode_t, cudaGraphNodeType* type) {
  return *type = cudaGraphNodeTypeKernel, cudaSuccess;
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  for (const auto& launch : graph->launches) launch();
  return cudaSuccess;
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete graph, cudaSuccess; }

template <typename... Parameters, typename... Arguments>
void launch_on_host(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                    const Arguments&... arguments) {
  const auto launch = [=]() { launch_at_once(kernel, blocks, threads, stream, arguments...); };
  if (capturing != nullptr) {
    capturing->launches.push_back(launch);
  } else {
    launch();
  }
}
