// SPDX-License-Identifier: Apache-2.0
// A slot of a narrow history on the CPU, read and written in stretches (block_scale.h says how numbers are stored).
// Must not know the formula.
#pragma once

#include <cstdint>

#include "asgd_kernel.h"
#include "block_scale.h"

namespace paddle_asgd {

// How one narrow type is stored and read. What is written begins with a block; what is read begins with one or lies
// within one. None of the arrays overlap.
template <typename T>
struct NarrowStorage {
  void (*read)(const void* y, const float* scale, T* out, int64_t length);
  // Gives back in `stored` what read() will.
  void (*write)(const T* g, void* y, float* scale, T* stored, int64_t length);
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
  void write(int64_t begin, int64_t length, const T* g, T* stored) const {
    storage->write(g, y + begin * item, scale + begin / kScaleBlock, stored, length);
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
