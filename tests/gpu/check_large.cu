// SPDX-License-Identifier: Apache-2.0
// Whether a tensor of more elements than 32 bits count, 2^31 + 1 of bfloat16 with two slots, gets the CPU's bits: all
// of them. Takes 26 GB on either side. `check_large [elements]`.
#include <algorithm>
#include <atomic>
#include <thread>

#include "block_scale.h"
#include "device.h"
#include "driver.h"
#include "fill.h"

namespace gpu {
namespace {

using paddle_asgd::History;
using paddle_asgd::TensorArgs;

constexpr int64_t kN = 2;

// Calls on pieces of [0, count), several at a time.
template <typename Work>
void in_pieces(int64_t count, int64_t piece, const Work& work) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::min(16u, std::thread::hardware_concurrency())); ++i) {
    threads.emplace_back([&]() {
      for (int64_t begin; (begin = next.fetch_add(piece)) < count;) work(begin, std::min(begin + piece, count));
    });
  }
  for (std::thread& thread : threads) thread.join();
}

constexpr int64_t kPiece = int64_t{1} << 24;

class HostBytes {
 public:
  explicit HostBytes(int64_t size) : bytes_(static_cast<uint8_t*>(std::aligned_alloc(64, (size + 63) / 64 * 64))) {
    CHECK(bytes_ != nullptr, "no %ld bytes on the host", static_cast<long>(size));
    in_pieces(size, kPiece, [&](int64_t begin, int64_t end) { std::memset(bytes_ + begin, 0, end - begin); });
  }
  HostBytes(const HostBytes&) = delete;
  HostBytes& operator=(const HostBytes&) = delete;
  ~HostBytes() { std::free(bytes_); }
  uint8_t* at() const { return bytes_; }

 private:
  uint8_t* bytes_;
};

// A buffer on both sides.
struct Both {
  Both(const char* name_, int64_t size_) : name(name_), size(size_), host(size_), device(size_) {
    CUDA(cudaMemset(device.at(), 0, size));
  }
  void draw(uint64_t seed) {
    uint16_t* numbers = reinterpret_cast<uint16_t*>(host.at());
    fill_on_device(device.at(), size / 2, seed, nullptr);
    in_pieces(size / 2, kPiece, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) numbers[e] = number_at(e, seed);
    });
  }
  void compare(const std::string& where, Tally* tally) const {
    std::atomic<int64_t> first{INT64_MAX};
    in_pieces(size, kPiece, [&](int64_t begin, int64_t end) {
      std::vector<uint8_t> got(end - begin);
      CUDA(cudaMemcpy(got.data(), device.at(begin), end - begin, cudaMemcpyDeviceToHost));
      if (std::memcmp(got.data(), host.at() + begin, end - begin) == 0) return;
      const int64_t here = begin + (std::mismatch(got.begin(), got.end(), host.at() + begin).first - got.begin());
      for (int64_t known = first; here < known && !first.compare_exchange_weak(known, here);) continue;
    });
    tally->count();
    if (first != INT64_MAX) tally->differ(where + name + " from byte " + std::to_string(first));
  }
  const char* name;
  int64_t size;
  HostBytes host;
  Memory device;
};

bool check(int64_t numel, History history) {
  const bool narrow = history != History::kExact;
  Tally tally(narrow ? "2^31 + 1 elements, history of int16" : "2^31 + 1 elements");
  tally.note("elements", std::to_string(numel));
  Both param("param", 2 * numel), grad("grad", 2 * numel), d("d", 4 * numel), y("y", 2 * kN * numel), m("m", 8);
  Both y_scale("y_scale", narrow ? 4 * kN * paddle_asgd::scale_blocks(numel) : 4);
  param.draw(1);
  const auto args = [&](bool device) {
    const auto at = [&](const Both& both) -> void* { return device ? both.device.at() : both.host.at(); };
    TensorArgs t{};
    t.param = at(param), t.grad = at(grad), t.d = at(d), t.y = at(y), t.m = static_cast<int64_t*>(at(m));
    t.y_scale = narrow ? static_cast<float*>(at(y_scale)) : nullptr;
    t.numel = numel, t.param_dtype = t.grad_dtype = paddle_asgd::DType::kBFloat16, t.history = history;
    return std::vector<TensorArgs>{t};
  };
  const auto here = args(false), there = args(true);
  for (uint64_t k = 0; k < 3 * kN + 2; ++k) {
    grad.draw(2 + k);
    CUDA(cudaDeviceSynchronize());
    succeed(paddle_asgd::asgd_cuda(native_test::step_args(there, kN), 0, nullptr));
    paddle_asgd::asgd_cpu(native_test::step_args(here, kN));
    CUDA(cudaDeviceSynchronize());
    if (k != 0 && k != 3 * kN + 1) continue;
    for (const Both* both : {&param, &grad, &d, &y, &y_scale, &m})
      both->compare("step " + std::to_string(k) + ": ", &tally);
  }
  return tally.report();
}

}  // namespace
}  // namespace gpu

int main(int argc, char** argv) {
  const int64_t numel = argc > 1 ? std::strtoll(argv[1], nullptr, 10) : (int64_t{1} << 31) + 1;
  bool whole = true;
  // One after the other: their memory does not fit twice.
  for (const auto history : {paddle_asgd::History::kExact, paddle_asgd::History::kInt16}) {
    whole &= gpu::check(numel, history);
  }
  return whole ? 0 : 1;
}
