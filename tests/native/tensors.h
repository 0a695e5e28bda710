// SPDX-License-Identifier: Apache-2.0
// Tensors for the native tests: raw memory between guard bytes, filled from integers, read as double. Must not know
// what a step does.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "asgd_kernel.h"
#include "asgd_slots.h"
#include "block_scale.h"
#include "check.h"
#include "half.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size) static_cast<void>(0)
#define ASAN_UNPOISON_MEMORY_REGION(address, size) static_cast<void>(0)
#endif

namespace native_test {

using paddle_asgd::DType;
using paddle_asgd::History;

// What only a damaged checkpoint can hold as a clock.
constexpr int64_t kDamaged[] = {-1, -2, -1000003, INT64_MIN, INT64_MIN + 1, INT64_MAX, INT64_MAX - 1, int64_t{1} << 62};
// Lengths of a history that no memory limits, because the history of an empty parameter has no bytes.
constexpr int64_t kEndless[] = {int64_t{1} << 40, int64_t{1} << 61, int64_t{1} << 62, INT64_MAX};

// Splitmix64: the same numbers with every compiler and library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  // In [-1, 1), of very different magnitudes.
  double number() {
    const int exponent = static_cast<int>(next() % 24);
    return std::ldexp(static_cast<double>(static_cast<int64_t>(next()) >> 10), -53 - exponent);
  }
  // Multiples of 1/4 in [-2, 2): their sums are exact in any order and any format.
  double quarter() { return std::ldexp(static_cast<double>(next() % 16) - 8, -2); }

 private:
  uint64_t state_;
};

// Elements of one type, `offset` elements behind 16-byte alignment. Before and behind lie guard bytes.
class Buffer {
 public:
  // The second form is for elements that are not read as numbers.
  Buffer(DType dtype, int64_t count, int64_t offset = 0) : Buffer(dtype, count, element(dtype), offset) {}
  Buffer(DType dtype, int64_t count, size_t element, int64_t offset)
      : dtype_(dtype), size_(count * element), left_(kGuard + offset * element), bytes_(left_ + size_ + kGuard, kFill) {
    ASAN_POISON_MEMORY_REGION(bytes_.data(), left_);
    ASAN_POISON_MEMORY_REGION(bytes_.data() + left_ + size_, kGuard);
    std::memset(begin(), 0, size_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
    ASAN_UNPOISON_MEMORY_REGION(bytes_.data(), bytes_.size());
    for (size_t i = 0; i < bytes_.size(); ++i) {
      const bool guard = i < left_ || i >= left_ + size_;
      CHECK(!guard || bytes_[i] == kFill, "written %zd bytes from the begin of %zu", static_cast<ssize_t>(i - left_),
            size_);
    }
  }

  // Null when empty, as Paddle has it.
  void* data() const { return size_ == 0 ? nullptr : begin(); }
  std::string bytes() const { return std::string(reinterpret_cast<const char*>(begin()), size_); }
  double at(int64_t i) const { return read(bytes_.data() + left_, dtype_, i); }

  static double read(const void* memory, DType dtype, int64_t i) {
    switch (dtype) {
      case DType::kFloat64:
        return element_at<double>(memory, i);
      case DType::kFloat16:
        return paddle_asgd::widen(element_at<paddle_asgd::Float16>(memory, i));
      case DType::kBFloat16:
        return paddle_asgd::widen(element_at<paddle_asgd::BFloat16>(memory, i));
      case DType::kFloat32:
        break;
    }
    return element_at<float>(memory, i);
  }

  void put(int64_t i, double value) {
    uint8_t* where = begin() + i * element();
    const float single = static_cast<float>(value);
    paddle_asgd::Float16 half;
    paddle_asgd::BFloat16 brain;
    paddle_asgd::narrow(single, &half);
    paddle_asgd::narrow(single, &brain);
    const void* from[] = {&single, &value, &half, &brain};  // in the order of DType
    std::memcpy(where, from[static_cast<int>(dtype_)], element());
  }
  void fill(double value) {
    for (size_t i = 0; i < size_ / element(); ++i) put(static_cast<int64_t>(i), value);
  }

 private:
  template <typename S>
  static S element_at(const void* memory, int64_t i) {
    S value;
    std::memcpy(&value, static_cast<const uint8_t*>(memory) + i * sizeof(S), sizeof(S));
    return value;
  }
  size_t element() const { return element(dtype_); }
  static size_t element(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }
  uint8_t* begin() const { return const_cast<uint8_t*>(bytes_.data()) + left_; }

  static constexpr size_t kGuard = 64;
  static constexpr uint8_t kFill = 0xa5;
  DType dtype_;
  size_t size_;
  size_t left_;
  std::vector<uint8_t> bytes_;
};

// The combinations of storage types that the kernels know.
struct Types {
  const char* name;
  DType param;
  DType grad;
  bool master;
  History history = History::kExact;
  bool narrow() const { return history != History::kExact; }
  // Bytes of a number in the history.
  int64_t stored_size() const {
    return narrow() ? narrow_size(history) : grad == DType::kFloat64 ? 8 : grad == DType::kFloat32 ? 4 : 2;
  }
  DType compute() const { return param == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }
};
constexpr Types kTypes[] = {{"float32", DType::kFloat32, DType::kFloat32, false},
                            {"float64", DType::kFloat64, DType::kFloat64, false},
                            {"float16", DType::kFloat16, DType::kFloat16, false},
                            {"float16 master", DType::kFloat16, DType::kFloat16, true},
                            {"float16 grad32", DType::kFloat16, DType::kFloat32, false},
                            {"float16 grad32 master", DType::kFloat16, DType::kFloat32, true},
                            {"bfloat16", DType::kBFloat16, DType::kBFloat16, false},
                            {"bfloat16 master", DType::kBFloat16, DType::kBFloat16, true},
                            {"bfloat16 grad32", DType::kBFloat16, DType::kFloat32, false},
                            {"bfloat16 grad32 master", DType::kBFloat16, DType::kFloat32, true}};

constexpr Types kNarrowTypes[] = {
    {"float32, int16", DType::kFloat32, DType::kFloat32, false, History::kInt16},
    {"float32, int8", DType::kFloat32, DType::kFloat32, false, History::kInt8},
    {"float64, int16", DType::kFloat64, DType::kFloat64, false, History::kInt16},
    {"float64, int8", DType::kFloat64, DType::kFloat64, false, History::kInt8},
    {"float16, int8", DType::kFloat16, DType::kFloat16, false, History::kInt8},
    {"float16 master, int16", DType::kFloat16, DType::kFloat16, true, History::kInt16},
    {"float16 grad32 master, int8", DType::kFloat16, DType::kFloat32, true, History::kInt8},
    {"bfloat16, int16", DType::kBFloat16, DType::kBFloat16, false, History::kInt16},
    {"bfloat16 master, int8", DType::kBFloat16, DType::kBFloat16, true, History::kInt8},
    {"bfloat16 grad32, int16", DType::kBFloat16, DType::kFloat32, false, History::kInt16}};

inline std::vector<Types> every_types() {
  std::vector<Types> types(std::begin(kTypes), std::end(kTypes));
  types.insert(types.end(), std::begin(kNarrowTypes), std::end(kNarrowTypes));
  return types;
}

// One parameter with gradient and state. Offsets differ between its buffers, so that none is aligned like another.
struct Tensor {
  // `indexed`: with the clock of a step that is told its slot.
  Tensor(const Types& types_, int64_t numel_, int64_t n, int64_t offset, bool indexed = false)
      : types(types_),
        numel(numel_),
        param(types.param, numel, offset),
        grad(types.grad, numel, 2 * offset),
        d(types.compute(), numel, 3 * offset),
        y(types.grad, n * numel, types.stored_size(), offset),
        y_scale(DType::kFloat32, types.narrow() ? n * paddle_asgd::scale_blocks(numel) : 0, offset),
        master(DType::kFloat32, types.master ? numel : 0, 3 * offset),
        clock(DType::kFloat64, indexed ? paddle_asgd::clock_length(n) : 1, offset) {}

  void set_weight(int64_t e, double value) {
    param.put(e, value);
    if (types.master) master.put(e, value);
  }
  void set_weights(double value) {
    for (int64_t e = 0; e < numel; ++e) set_weight(e, value);
  }
  const Buffer& weights() const { return types.master ? master : param; }
  int64_t* m() const { return static_cast<int64_t*>(clock.data()); }
  // Everything that a step may change: the elements, and the clock.
  std::string elements() const { return param.bytes() + d.bytes() + y.bytes() + y_scale.bytes() + master.bytes(); }
  std::string bytes() const { return elements() + clock.bytes(); }
  // What a slot holds of an element: in this history, or in one of its size.
  double stored(int64_t slot, int64_t e) const { return stored(y.data(), y_scale.data(), slot, e); }
  double stored(const void* history, const void* scales, int64_t slot, int64_t e) const {
    const int64_t at = slot * numel + e;
    if (!types.narrow()) return Buffer::read(history, types.grad, at);
    const int64_t block = slot * paddle_asgd::scale_blocks(numel) + e / paddle_asgd::kScaleBlock;
    const float scale = static_cast<float>(Buffer::read(scales, DType::kFloat32, block));
    int16_t wide = static_cast<const int8_t*>(history)[at * types.stored_size()];
    if (types.history == History::kInt16) std::memcpy(&wide, static_cast<const int8_t*>(history) + 2 * at, 2);
    return types.compute() == DType::kFloat64 ? paddle_asgd::from_stored<double>(wide, scale)
                                              : paddle_asgd::from_stored<float>(wide, scale);
  }
  paddle_asgd::TensorArgs args() {
    return {param.data(),
            grad.data(),
            d.data(),
            y.data(),
            static_cast<float*>(y_scale.data()),
            m(),
            types.master ? master.data() : nullptr,
            numel,
            types.param,
            types.grad,
            types.history};
  }

  Types types;
  int64_t numel;
  Buffer param, grad, d, y, y_scale, master;
  Buffer clock;  // of int64, which are as wide as what the buffer takes them for
};

using Tensors = std::vector<std::unique_ptr<Tensor>>;

}  // namespace native_test
