// SPDX-License-Identifier: Apache-2.0
// Reads a gradient in stretches on the CPU, whether it is dense or sparse. Must not write to it, nor know what it is
// for.
#pragma once

#include <algorithm>

#include "asgd_kernel.h"
#include "half.h"

namespace paddle_asgd {

// There is no dense copy of a sparse gradient. The step visits every element in any case, because d moves them all, but
// adding up a block in the first-level cache costs less than reading its zeros, and needs no memory of that size.
template <typename G>
struct Gradient {
  const G* values;
  const GradientRows* rows;  // null: dense

  // The elements [begin, begin + length), where they are or put into `room`, which has that length.
  const G* stretch(int64_t begin, int64_t length, G* room) const {
    return rows == nullptr ? values + begin : add_up(begin, length, room);
  }

 private:
  // Rows that come more than once are added in the order in which they came and rounded after each addition: Paddle's
  // dense gradient has these bits.
  const G* add_up(int64_t begin, int64_t length, G* room) const {
    const int64_t width = rows->width;
    const auto above = [](const GradientRow& entry, int64_t row) { return entry.row < row; };
    std::fill(room, room + length, G{});
    for (auto entry = std::lower_bound(rows->begin, rows->end, begin / width, above);
         entry != rows->end && entry->row * width < begin + length; ++entry) {
      const int64_t row = entry->row * width;
      const int64_t from = std::max(row, begin), to = std::min(row + width, begin + length);
      const G* source = values + entry->position * width + (from - row);
      G* target = room + (from - begin);
      for (int64_t j = 0; j < to - from; ++j) narrow(widen(target[j]) + widen(source[j]), &target[j]);
    }
    return room;
  }
};

// `t` must be one of the step's own tensors: its position among them finds the rows.
template <typename G>
Gradient<G> gradient_of(const TensorArgs& t, const StepArgs& step) {
  const GradientRows* rows = step.gradient_rows == nullptr ? nullptr : step.gradient_rows + (&t - step.tensors);
  return Gradient<G>{static_cast<const G*>(t.grad), rows == nullptr || rows->width == 0 ? nullptr : rows};
}

}  // namespace paddle_asgd
