// SPDX-License-Identifier: Apache-2.0
// What the kernels of AveragedModel take, and their two entry points, one a device. Raw pointers only: must not include
// Paddle or CUDA. Whoever calls has checked every size, dtype and place before (paddle_average_op.cc).
#pragma once

#include <cstdint>

#include "kernel_arguments.h"

namespace paddle_asgd {

// Two tensors of as many elements. What is done to them depends on the list that the pair is in.
struct PairArgs {
  void* first;
  void* second;
  int64_t numel;
  DType first_dtype;
  DType second_dtype;
};

struct Pairs {
  const PairArgs* begin;
  int64_t count;
  double weight;  // only in AverageArgs::averaged
};

// One call, in which no tensor is twice.
struct AverageArgs {
  Pairs averaged;   // first <- average(first, second, weight): first is float or double, and no narrower than second
  Pairs rounded;    // first <- second, rounded once: second is float or double, and of another dtype than first
  Pairs copied;     // first <- second, byte by byte; numel counts the bytes, and dtypes say nothing
  Pairs exchanged;  // first <-> second, likewise
};

void average_cpu(const AverageArgs& args);

// Enqueues the work on `stream` (a cudaStream_t) of `device`; returns null, or CUDA's words about what went wrong.
const char* average_cuda(const AverageArgs& args, int device, void* stream);

}  // namespace paddle_asgd
