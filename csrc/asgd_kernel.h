// SPDX-License-Identifier: Apache-2.0
// What the kernels take, and their entry points. Raw pointers only: must not include Paddle or CUDA. The caller has
// checked every size, dtype and place (paddle_asgd_op.cc); a kernel would write outside of memory that is too short.
#pragma once

#include <cstdint>

#include "gradient_rows.h"
#include "kernel_arguments.h"

namespace paddle_asgd {

// How a stored gradient is kept: in the gradient's dtype, or as integers with a scale for each block (block_scale.h).
enum class History : int8_t { kExact, kInt16, kInt8 };

// Bytes of a stored number that is narrow.
PADDLE_ASGD_HOST_DEVICE int64_t narrow_size(History history) { return history == History::kInt16 ? 2 : 1; }

// One parameter and its state. The arithmetic is done in double for a float64 parameter and in float for all others.
struct TensorArgs {
  void* param;       // [numel] of param_dtype
  const void* grad;  // [numel] of grad_dtype, or the values of the rows that StepArgs::gradient_rows names
  void* d;           // [numel], float or double: the sum of the stored gradients
  void* y;           // [batch_num, numel] of grad_dtype, or as `history` says: the stored gradients
  float* y_scale;    // [batch_num, scale_blocks(numel)], or null where the history is exact
  int64_t* m;        // the clock, read and advanced by the kernel: [1], or as asgd_slots.h says with a batch index
  void* master;      // [numel] float, or null: the weights that a 16-bit parameter is rounded from
  int64_t numel;
  DType param_dtype;
  DType grad_dtype;  // param_dtype, or float32 for a 16-bit parameter
  History history;
};

// Which slot this step's batch has, if the user says so.
struct BatchIndex {
  bool given;           // false: the slots take turns, by each parameter's own clock
  const int64_t* data;  // null: `value` holds
  int64_t value;
};

// Called where `data` lies.
PADDLE_ASGD_HOST_DEVICE int64_t load(const BatchIndex& index) {
  return index.data == nullptr ? index.value : *index.data;
}

struct StepArgs {
  const TensorArgs* tensors;
  int64_t count;
  int64_t batch_num;
  Scalar learning_rate;
  Scalar weight_decay;
  const bool* found_inf;  // device memory, or null. True: the step changes nothing
  BatchIndex batch_index;
  const double* batch_weights;  // [batch_num] of mean 1 in device memory, or null: all batches weigh the same
  bool has_theta;
  Scalar theta;
  double* watch;                      // [kWatchSize] in device memory (asgd_watch.h), or null
  const GradientRows* gradient_rows;  // [count] in host memory, or null: all gradients are dense. On the CPU only
};

// A batch index out of range changes nothing but the watch, which notes it: a device cannot raise.
void asgd_cpu(const StepArgs& step);

// Enqueues the step on `stream` (a cudaStream_t) of `device`; returns null, or CUDA's words about what went wrong.
const char* asgd_cuda(const StepArgs& step, int device, void* stream);

// Adds to `sum`, one double in device memory, the squares of known_gradient (asgd_formula.h) of all tensors; of a step
// it reads the tensors but for their gradients and histories, batch_num, weight_decay, batch_weights, and of
// batch_index whether one is given.
void asgd_norm_cpu(const StepArgs& step, double* sum);
const char* asgd_norm_cuda(const StepArgs& step, double* sum, int device, void* stream);

}  // namespace paddle_asgd
