// SPDX-License-Identifier: Apache-2.0
// A slot of a narrow history on the CPU, a stretch of elements at a time (block_scale.h says how numbers are stored).
// Must not loop over elements.
#pragma once

#include <cstdint>

#include "asgd_formula.h"
#include "asgd_kernel.h"
#include "block_scale.h"

namespace paddle_asgd {

// What is done with a stretch of one stored type. It begins with a block, except that read() may lie within one. None
// of the arrays overlap.
template <typename T>
struct NarrowStorage {
  void (*read)(const void* y, const float* scale, T* out, int64_t length);
  void (*write)(const T* g, void* y, float* scale, int64_t length);
  // One step: y is read, moves d and x by the formula, and is replaced.
  void (*update)(T* x, const T* g, T* d, void* y, float* scale, Coefficients<T> c, bool has_theta, int64_t length);
};

// For the arithmetic's type; asgd_history_cpu.cc.
const NarrowStorage<float>& narrow_storage(History history, float);
const NarrowStorage<double>& narrow_storage(History history, double);

// Where a narrow slot lies.
template <typename T>
struct NarrowSlot {
  const NarrowStorage<T>* storage;  // null: the history is exact
  char* y;
  float* scale;
  int64_t item;

  void read(int64_t begin, int64_t length, T* out) const {
    storage->read(y + begin * item, scale + begin / kScaleBlock, out, length);
  }
  void write(int64_t begin, int64_t length, const T* g) const {
    storage->write(g, y + begin * item, scale + begin / kScaleBlock, length);
  }
  void update(T* x, const T* g, T* d, int64_t begin, int64_t length, Coefficients<T> c, bool has_theta) const {
    storage->update(x, g, d, y + begin * item, scale + begin / kScaleBlock, c, has_theta, length);
  }
};

template <typename T>
NarrowSlot<T> narrow_slot(const TensorArgs& t, int64_t slot) {
  if (t.history == History::kExact) return NarrowSlot<T>{};
  const int64_t item = narrow_size(t.history);
  return NarrowSlot<T>{&narrow_storage(t.history, T{}), static_cast<char*>(t.y) + slot * t.numel * item,
                       t.y_scale + slot * scale_blocks(t.numel), item};
}

}  // namespace paddle_asgd
