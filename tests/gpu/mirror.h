// SPDX-License-Identifier: Apache-2.0
// The tensors of tests/native on the device: the same bytes, aligned alike, between guard bytes, and their comparison
// with what the CPU's kernel made of the host's. Must not know what a step does.
#pragma once

#include <memory>

#include "device.h"
#include "tensors.h"

namespace gpu {

using native_test::Buffer;
using native_test::DType;
using native_test::Tensors;
using paddle_asgd::TensorArgs;

// Without guard bytes every buffer is an allocation of its own, and whoever leaves it is seen by a memory checker.
inline bool guarded = true;

// Several buffers that travel together.
class Image {
 public:
  // `dtype`: as what its elements are compared; none: as bytes.
  void add(const Buffer& buffer, DType dtype, bool bytes = false) {
    const std::string held = buffer.bytes();
    Part part{&buffer, dtype, bytes, held.size(), 0};
    const size_t misaligned = reinterpret_cast<uintptr_t>(buffer.data()) % 16;
    part.begin = total_ + (guarded ? kGuard : 0) + (held.empty() ? 0 : misaligned);
    total_ = (part.begin + part.size + (guarded ? kGuard : 0) + kAlign - 1) / kAlign * kAlign;
    parts_.push_back(part);
  }
  // Takes the memory, and everything that the buffers hold.
  void commit() {
    memory_.clear();
    if (guarded) {
      memory_.emplace_back(total_);
    } else {
      for (const Part& part : parts_) memory_.emplace_back(part.size == 0 ? 0 : part.begin % 16 + part.size);
    }
    upload();
  }
  void upload() {
    staged_.assign(total_, kFill);
    for (const Part& part : parts_) {
      const std::string held = part.buffer->bytes();
      std::memcpy(staged_.data() + part.begin, held.data(), held.size());
    }
    each_piece([](const Memory& memory, uint8_t* at) { memory.upload(at); });
  }
  void download() {
    staged_.assign(total_, 0);
    each_piece([](const Memory& memory, uint8_t* at) { memory.download(at); });
  }
  void* device(size_t i) const {
    const Part& part = parts_[i];
    if (part.size == 0) return nullptr;
    return guarded ? memory_[0].at(part.begin) : memory_[i].at(part.begin % 16);
  }
  // After download(): the first byte of buffer `i` that differs, or -1. A NaN equals every other.
  int64_t difference(size_t i) const {
    const Part& part = parts_[i];
    const std::string held = part.buffer->bytes();
    const uint8_t* got = staged_.data() + part.begin;
    if (std::memcmp(got, held.data(), held.size()) == 0) return -1;
    const int64_t size = part.dtype == DType::kFloat64 ? 8 : part.dtype == DType::kFloat32 ? 4 : 2;
    for (int64_t e = 0; e * size < static_cast<int64_t>(part.size); ++e) {
      if (std::memcmp(got + e * size, held.data() + e * size, size) == 0) continue;
      if (part.bytes || !same(Buffer::read(got, part.dtype, e), Buffer::read(held.data(), part.dtype, e))) {
        return e * size;
      }
    }
    return -1;
  }
  // After download(): whether all that lies between the buffers is as it was.
  bool guards_whole() const {
    size_t at = 0;
    for (const Part& part : parts_) {
      for (; guarded && at < part.begin; ++at) {
        if (staged_[at] != kFill) return false;
      }
      at = part.begin + part.size;
    }
    for (; guarded && at < total_; ++at) {
      if (staged_[at] != kFill) return false;
    }
    return true;
  }
  size_t size() const { return parts_.size(); }

 private:
  struct Part {
    const Buffer* buffer;
    DType dtype;
    bool bytes;
    size_t size, begin;
  };
  template <typename Copy>
  void each_piece(const Copy& copy) {
    for (size_t i = 0; i < memory_.size(); ++i) {
      if (memory_[i].size() == 0) continue;
      // Without guards, from where the allocation's first byte belongs.
      copy(memory_[i], staged_.data() + (guarded ? 0 : parts_[i].begin / 16 * 16));
    }
  }
  static constexpr size_t kGuard = 64, kAlign = 256;
  static constexpr uint8_t kFill = 0xa5;
  std::vector<Part> parts_;
  std::vector<Memory> memory_;
  std::vector<uint8_t> staged_;
  size_t total_ = 0;
};

// Tensors on the device beside those on the host.
class Mirrored {
 public:
  explicit Mirrored(const Tensors& tensors) : tensors_(tensors) {
    for (const auto& t : tensors) {
      gradients_.add(t->grad, t->types.grad);
      state_.add(t->param, t->types.param);
      state_.add(t->d, t->types.compute());
      state_.add(t->y, t->types.grad, t->types.narrow());
      state_.add(t->y_scale, DType::kFloat32);
      state_.add(t->master, DType::kFloat32);
      state_.add(t->clock, DType::kFloat64, true);
    }
    gradients_.commit();
    state_.commit();
  }
  std::vector<TensorArgs> args() const {
    std::vector<TensorArgs> result;
    for (size_t i = 0; i < tensors_.size(); ++i) {
      TensorArgs t = tensors_[i]->args();
      t.grad = gradients_.device(i);
      t.param = state_.device(kOfTensor * i);
      t.d = state_.device(kOfTensor * i + 1);
      t.y = state_.device(kOfTensor * i + 2);
      t.y_scale = static_cast<float*>(state_.device(kOfTensor * i + 3));
      t.master = state_.device(kOfTensor * i + 4);
      t.m = static_cast<int64_t*>(state_.device(kOfTensor * i + 5));
      result.push_back(t);
    }
    return result;
  }
  void upload_gradients() { gradients_.upload(); }
  void compare(const std::string& where, Tally* tally) {
    static constexpr const char* kNames[] = {"param", "d", "y", "y_scale", "master", "m"};
    state_.download();
    for (size_t i = 0; i < state_.size(); ++i) {
      tally->count();
      const int64_t byte = state_.difference(i);
      if (byte < 0) continue;
      tally->differ(where + ": tensor " + std::to_string(i / kOfTensor) + " (" + tensors_[i / kOfTensor]->types.name +
                    ", " + std::to_string(tensors_[i / kOfTensor]->numel) + "): " + kNames[i % kOfTensor] +
                    " from byte " + std::to_string(byte));
    }
    if (!state_.guards_whole()) tally->differ(where + ": written outside of a tensor");
  }

 private:
  static constexpr size_t kOfTensor = 6;  // buffers of state
  const Tensors& tensors_;
  Image gradients_, state_;
};

}  // namespace gpu
