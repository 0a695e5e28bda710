// SPDX-License-Identifier: Apache-2.0
// A gradient of which only some rows are there, and how a kernel on the CPU reads a gradient in stretches, dense or
// sparse. Plain C++: must not include Paddle or CUDA, write to a gradient, nor know what it is for.
#pragma once

#include <algorithm>
#include <cstdint>

#include "half.h"

namespace paddle_asgd {

struct GradientRow {  // of a sparse gradient
  int64_t row;        // of the parameter, which it is added to
  int64_t position;   // among the values
};

// The rows of one sparse gradient; all others are zero. The kernel searches them, so they must be sorted.
struct GradientRows {
  const GradientRow* begin;  // sorted by row, and those of one row by position
  const GradientRow* end;
  int64_t width;  // elements of a row; 0: this gradient is dense
};

// There is no dense copy of a sparse gradient. A step visits every element in any case, for a gradient of zero moves it
// too, but adding up a block in the first-level cache costs less than reading its zeros, and needs no memory of that
// size.
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

// The `index`th gradient of a step; `rows` is null if all gradients are dense.
template <typename G>
Gradient<G> gradient_at(const void* values, const GradientRows* rows, int64_t index) {
  const bool sparse = rows != nullptr && rows[index].width != 0;
  return Gradient<G>{static_cast<const G*>(values), sparse ? rows + index : nullptr};
}

}  // namespace paddle_asgd
