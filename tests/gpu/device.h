// SPDX-License-Identifier: Apache-2.0
// Device memory, and the one way in which the programs here report: a line of JSON for each check. Must not know what
// is checked.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "check.h"

#define CUDA(call)                                                                           \
  do {                                                                                       \
    const cudaError_t error_ = (call);                                                       \
    CHECK(error_ == cudaSuccess, "CUDA says '%s' to %s", cudaGetErrorString(error_), #call); \
  } while (false)

namespace gpu {

class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_(bytes) {
    if (bytes != 0) CUDA(cudaMalloc(&memory_, bytes));
  }
  Memory(Memory&& other) noexcept : memory_(other.memory_), bytes_(other.bytes_) { other.memory_ = nullptr; }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { cudaFree(memory_); }

  template <typename T = uint8_t>
  T* at(size_t offset = 0) const {
    return reinterpret_cast<T*>(static_cast<uint8_t*>(memory_) + offset);
  }
  size_t size() const { return bytes_; }
  void upload(const void* from) const { CUDA(cudaMemcpy(memory_, from, bytes_, cudaMemcpyHostToDevice)); }
  void download(void* to) const { CUDA(cudaMemcpy(to, memory_, bytes_, cudaMemcpyDeviceToHost)); }

 private:
  void* memory_ = nullptr;
  size_t bytes_;
};

// What one check found. Goes on after a difference, so that a report says how many there are.
class Tally {
 public:
  explicit Tally(const char* name) : name_(name) {}
  void count(int64_t compared = 1) { compared_ += compared; }
  void differ(const std::string& where) {
    ++different_;
    if (first_.size() < 5) first_.push_back(where);
  }
  void note(const std::string& key, const std::string& json) { notes_ += ", \"" + key + "\": " + json; }

  // Prints; true if nothing differed.
  bool report() const {
    std::string first;
    for (const std::string& where : first_) first += (first.empty() ? "\"" : ", \"") + where + "\"";
    std::printf("{\"check\": \"%s\", \"compared\": %ld, \"different\": %ld, \"first\": [%s]%s}\n", name_,
                static_cast<long>(compared_), static_cast<long>(different_), first.c_str(), notes_.c_str());
    std::fflush(stdout);
    return different_ == 0 && compared_ > 0;
  }

 private:
  const char* name_;
  int64_t compared_ = 0, different_ = 0;
  std::vector<std::string> first_;
  std::string notes_;
};

}  // namespace gpu
