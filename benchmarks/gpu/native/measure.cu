// SPDX-License-Identifier: Apache-2.0
// Times a step, the floor of its bytes and a copy of as many, with events of CUDA. Reads cases from a file, a line
// each: name, dtype, n, number of samples, then the tensors' sizes. Prints a line of JSON for each figure; asserts
// nothing.
#include <algorithm>
#include <chrono>
#include <fstream>
#include <functional>
#include <numeric>
#include <sstream>

#include "asgd_watch.h"
#include "block_scale.h"
#include "device.h"
#include "floor.h"

namespace gpu {
namespace {

using paddle_asgd::DType;
using paddle_asgd::History;
using paddle_asgd::StepArgs;
using paddle_asgd::TensorArgs;
using Enqueue = std::function<void()>;

struct Case {
  std::string name, dtype;
  int64_t n, samples;
  std::vector<int64_t> sizes;
  // int16 and int8: float32 with a narrow history.
  bool half() const { return dtype == "bfloat16"; }
  History history() const {
    return dtype == "int16" ? History::kInt16 : dtype == "int8" ? History::kInt8 : History::kExact;
  }
  bool narrow() const { return history() != History::kExact; }
  int64_t stored() const { return narrow() ? paddle_asgd::narrow_size(history()) : half() ? 2 : 4; }
  int64_t numel() const { return std::accumulate(sizes.begin(), sizes.end(), int64_t{0}); }
  // Gradient, y_i, d and weight are read; y_i, d and weight written, and with a master weight the parameter too.
  int64_t moved() const { return numel() * (20 + 2 * stored()) + (narrow() ? numel() / 16 : 0); }
  // Of one element: parameter, gradient, d, master weight and history.
  int64_t held() const { return 12 + stored() * n; }
};

// The tensors of a case, in one piece of memory that is full of numbers.
class Tensors {
 public:
  explicit Tensors(const Case& c)
      : memory_(bytes_of(c)), clocks_(8 * c.sizes.size()), watch_(paddle_asgd::kWatchSize * sizeof(double)) {
    for (size_t begin = 0; begin < memory_.size(); begin += kFilled) {
      const int64_t count = static_cast<int64_t>(std::min(kFilled, memory_.size() - begin) / 2);
      fill_on_device(memory_.at(begin), count, begin, nullptr);
    }
    CUDA(cudaMemset(clocks_.at(), 0, clocks_.size()));
    CUDA(cudaMemset(watch_.at(), 0, watch_.size()));
    size_t at = 0;
    const auto take = [&](size_t bytes) { return at += padded(bytes), memory_.at(at - padded(bytes)); };
    const DType dtype = c.half() ? DType::kBFloat16 : DType::kFloat32;
    const size_t item = c.half() ? 2 : 4;
    for (size_t i = 0; i < c.sizes.size(); ++i) {
      const size_t numel = c.sizes[i];
      TensorArgs t{};
      t.param = take(item * numel), t.grad = take(item * numel), t.d = take(4 * numel);
      t.y = take(c.stored() * numel * c.n), t.m = clocks_.at<int64_t>(8 * i);
      t.numel = c.sizes[i], t.param_dtype = t.grad_dtype = dtype, t.history = c.history();
      if (c.half()) t.master = take(4 * numel);
      if (c.narrow()) t.y_scale = reinterpret_cast<float*>(take(scales_of(c, numel)));
      args_.push_back(t);
    }
    step_.tensors = args_.data();
    step_.count = static_cast<int64_t>(args_.size());
    step_.batch_num = c.n;
    step_.learning_rate = {nullptr, DType::kFloat64, 1e-7};
    step_.weight_decay = {nullptr, DType::kFloat64, 1e-4};
    CUDA(cudaDeviceSynchronize());
  }
  StepArgs step(bool watches) const {
    StepArgs step = step_;
    step.watch = watches ? watch_.at<double>() : nullptr;
    return step;
  }
  const Memory& memory() const { return memory_; }
  double* sum() const { return watch_.at<double>(); }
  static size_t bytes_of(const Case& c) {
    size_t total = 0;
    for (const int64_t numel : c.sizes) total += 6 * 256 + numel * c.held() + scales_of(c, numel);
    return total;
  }

 private:
  static size_t scales_of(const Case& c, int64_t numel) {
    return c.narrow() ? 4 * c.n * paddle_asgd::scale_blocks(numel) : 0;
  }
  static size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256; }
  static constexpr size_t kFilled = size_t{1} << 32;
  Memory memory_, clocks_, watch_;
  std::vector<TensorArgs> args_;
  StepArgs step_{};
};

class Clock {
 public:
  Clock(const Case& c, size_t flushed) : case_(c), flushed_(flushed) {
    CUDA(cudaEventCreate(&begin_));
    CUDA(cudaEventCreate(&end_));
  }
  ~Clock() { cudaEventDestroy(begin_), cudaEventDestroy(end_); }

  // Warm: the mean of calls in a row, and what the host takes to enqueue one. Flushed: single calls, each after writing
  // more than the second-level cache holds, so that the host is ahead and nothing of the call is cached.
  void time(const char* what, int64_t bytes, cudaStream_t stream, const Enqueue& enqueue) {
    for (int i = 0; i < 3; ++i) enqueue();
    const double once = span(stream, 1, enqueue);
    const int64_t calls = std::max<int64_t>(1, std::min<int64_t>(50, static_cast<int64_t>(3000 / (once + 1))));
    std::vector<double> warm, flushed, host;
    for (int64_t i = 0; i < case_.samples; ++i) {
      const auto start = std::chrono::steady_clock::now();
      CUDA(cudaEventRecord(begin_, stream));
      for (int64_t k = 0; k < calls; ++k) enqueue();
      host.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count() /
                     calls);
      warm.push_back(stop(stream) / calls);
    }
    for (int64_t i = 0; i < case_.samples; ++i) {
      CUDA(cudaMemsetAsync(flushed_.at(), static_cast<int>(i), flushed_.size(), stream));
      flushed.push_back(span(stream, 1, enqueue));
    }
    print(what, "warm", bytes, warm);
    print(what, "flushed", bytes, flushed);
    print(what, "host", bytes, host);
  }

  double span(cudaStream_t stream, int64_t calls, const Enqueue& enqueue) {
    CUDA(cudaEventRecord(begin_, stream));
    for (int64_t k = 0; k < calls; ++k) enqueue();
    return stop(stream);
  }

  void print(const char* what, const char* how, int64_t bytes, std::vector<double> us) const {
    std::sort(us.begin(), us.end());
    const auto at = [&](double share) { return us[static_cast<size_t>(share * static_cast<double>(us.size() - 1))]; };
    std::printf(
        "{\"case\": \"%s\", \"dtype\": \"%s\", \"n\": %ld, \"tensors\": %zu, \"numel\": %ld, \"what\": \"%s\", "
        "\"how\": \"%s\", \"bytes\": %ld, \"us\": %.3f, \"low\": %.3f, \"high\": %.3f, \"most\": %.3f}\n",
        case_.name.c_str(), case_.dtype.c_str(), static_cast<long>(case_.n), case_.sizes.size(),
        static_cast<long>(case_.numel()), what, how, static_cast<long>(bytes), at(0.5), at(0.25), at(0.75), us.back());
    std::fflush(stdout);
  }

 private:
  double stop(cudaStream_t stream) {
    CUDA(cudaEventRecord(end_, stream));
    CUDA(cudaEventSynchronize(end_));
    float ms = 0;
    CUDA(cudaEventElapsedTime(&ms, begin_, end_));
    return 1000.0 * ms;
  }
  const Case& case_;
  Memory flushed_;
  cudaEvent_t begin_, end_;
};

void time_case(const Case& c) {
  size_t free = 0, total = 0;
  CUDA(cudaMemGetInfo(&free, &total));
  if (Tensors::bytes_of(c) + (size_t{1} << 29) > free) {
    std::printf("{\"case\": \"%s\", \"dtype\": \"%s\", \"n\": %ld, \"left_out\": %zu}\n", c.name.c_str(),
                c.dtype.c_str(), static_cast<long>(c.n), Tensors::bytes_of(c));
    return;
  }
  const Tensors tensors(c);
  cudaStream_t stream;
  CUDA(cudaStreamCreate(&stream));
  // Several times the second-level cache of any GPU; less on the host, where this is only tried.
  Clock clock(c, std::min(size_t{1} << 28, total / 256));
  const StepArgs plain = tensors.step(false), watched = tensors.step(true);
  const auto step = [&]() { succeed(paddle_asgd::asgd_cuda(plain, 0, stream)); };
  clock.time("step", c.moved(), stream, step);
  clock.time("step with watch", c.moved(), stream, [&]() { succeed(paddle_asgd::asgd_cuda(watched, 0, stream)); });
  int64_t slot = 0;
  // A narrow history has no floor here; its copy of as many bytes is below.
  if (!c.narrow())
    clock.time("floor", c.moved(), stream, [&]() { CUDA(enqueue_floor(plain, slot = (slot + 1) % c.n, stream)); });
  clock.time("norm", c.numel() * 8, stream,
             [&]() { succeed(paddle_asgd::asgd_norm_cuda(plain, tensors.sum(), 0, stream)); });
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  step();
  CUDA(cudaStreamEndCapture(stream, &graph));
  CUDA(cudaGraphInstantiate(&replay, graph, 0));
  clock.time("step in a graph", c.moved(), stream, [&]() { CUDA(cudaGraphLaunch(replay, stream)); });
  CUDA(cudaGraphExecDestroy(replay));
  CUDA(cudaGraphDestroy(graph));
  // Last, for it overwrites the tensors.
  const size_t half = std::min<size_t>(c.moved() / 2, tensors.memory().size() / 2) / 256 * 256;
  clock.time("copy", 2 * half, stream, [&]() {
    CUDA(cudaMemcpyAsync(tensors.memory().at(half), tensors.memory().at(), half, cudaMemcpyDeviceToDevice, stream));
  });
  CUDA(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace gpu

int main(int argc, char** argv) {
  CHECK(argc == 2, "expected a file of cases");
  std::ifstream file(argv[1]);
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    gpu::Case c;
    words >> c.name >> c.dtype >> c.n >> c.samples;
    for (int64_t size; words >> size;) c.sizes.push_back(size);
    CHECK(!c.sizes.empty(), "'%s' is no case", line.c_str());
    gpu::time_case(c);
  }
  return 0;
}
