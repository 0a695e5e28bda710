// SPDX-License-Identifier: Apache-2.0
// One optimizer twice: its tensors on the host, stepped by the CPU's kernel, and on the device, stepped by the other.
// Each step gives its numbers by value or in tensors, in turn. Must not say which cases there are.
#pragma once

#include "asgd_watch.h"
#include "driver.h"
#include "mirror.h"

namespace gpu {

using native_test::kModes;
using native_test::kNarrowTypes;
using native_test::kTypes;
using native_test::Mode;
using native_test::Plan;
using native_test::Random;
using native_test::Types;
using paddle_asgd::Scalar;
using paddle_asgd::StepArgs;

// What a step may read from memory instead of being given it by value.
struct Numbers {
  double wide[3] = {native_test::kRate, native_test::kDecay, 0};
  float narrow[3] = {0.0625f, 0.28125f, 0};
  int64_t index = 0;
  bool found_inf = false;
};

enum class Form { kValues, kFloat64, kFloat32 };

// `numbers` lies where the kernel runs; `known` is the same on the host.
inline void set_form(StepArgs* step, Form form, const Numbers* numbers, const Numbers& known, bool flag) {
  Scalar* scalars[] = {&step->learning_rate, &step->weight_decay, &step->theta};
  for (int i = 0; i < 3; ++i) {
    if (form == Form::kValues) *scalars[i] = native_test::number(known.wide[i]);
    if (form == Form::kFloat64) *scalars[i] = Scalar{&numbers->wide[i], DType::kFloat64, NAN};
    if (form == Form::kFloat32) *scalars[i] = Scalar{&numbers->narrow[i], DType::kFloat32, NAN};
  }
  step->batch_index.value = known.index;
  if (form != Form::kValues) step->batch_index.data = &numbers->index;
  if (flag) step->found_inf = &numbers->found_inf;
}

class Twin {
 public:
  Twin(Tensors tensors, const Mode& mode, int64_t n, uint64_t seed)
      : plan(mode, n, seed),
        tensors_(std::move(tensors)),
        mirrored_(tensors_),
        numbers_(sizeof(Numbers)),
        weights_(mode.weighted ? n * sizeof(double) : 0),
        watch_(paddle_asgd::kWatchSize * sizeof(double)) {
    known.wide[2] = mode.theta;
    known.narrow[2] = static_cast<float>(mode.theta);
    if (mode.weighted) weights_.upload(plan.batch_weights());
    watch_.upload(plan.watch_sums());
    CUDA(cudaStreamCreate(&stream));
  }
  ~Twin() { cudaStreamDestroy(stream); }

  // Gradients that depend on the weights, on both sides.
  void draw() {
    native_test::set_gradients(tensors_, &plan.random);
    mirrored_.upload_gradients();
    plan.draw();
    known.index = plan.slot;
  }
  // The numbers reach the device as whoever computes them there would put them: before the step, on any stream.
  void send_numbers() {
    numbers_.upload(&known);
    CUDA(cudaDeviceSynchronize());
  }
  void step_on_host(Form form, bool flag) {
    const auto args = native_test::args_of(tensors_);
    StepArgs step = plan.step(args);
    set_form(&step, form, &known, known, flag);
    paddle_asgd::asgd_cpu(step);
  }
  StepArgs device_step(const std::vector<TensorArgs>& args, Form form, bool flag) const {
    StepArgs step = plan.step(args);
    set_form(&step, form, numbers_.at<Numbers>(), known, flag);
    step.batch_weights = plan.mode.weighted ? weights_.at<double>() : nullptr;
    step.watch = plan.watches ? watch_.at<double>() : nullptr;
    return step;
  }
  void step_on_device(Form form, bool flag) {
    const auto args = mirrored_.args();
    const StepArgs step = device_step(args, form, flag);
    succeed(paddle_asgd::asgd_cuda(step, 0, stream));
  }
  void step(Form form, bool flag) {
    send_numbers();
    step_on_host(form, flag);
    step_on_device(form, flag);
    CUDA(cudaStreamSynchronize(stream));
  }
  void compare(const std::string& where, Tally* tally) {
    CUDA(cudaStreamSynchronize(stream));
    mirrored_.compare(where, tally);
  }
  // `sums`: whether one launch saw all tensors, so that both kernels sample the same. The order differs, so each of the
  // sums, all of whose terms are positive, may differ by rounding.
  void compare_watch(const std::string& where, bool sums, Tally* tally) {
    using namespace paddle_asgd;
    double got[kWatchSize];
    watch_.download(got);
    for (int i = 0; i < kWatchSize; ++i) {
      const double expected = plan.watch_sums()[i];
      const bool sum = i <= kSampled || i >= kKept;
      tally->count();
      if (sum ? !sums || close(got[i], expected) : got[i] == expected) continue;
      tally->differ(where + ": watch entry " + std::to_string(i) + ": " + std::to_string(got[i]) + ", not " +
                    std::to_string(expected));
    }
  }
  void compare_norm(const std::string& where, Tally* tally) {
    const auto here = native_test::args_of(tensors_), there = mirrored_.args();
    double expected = 0, got = 0;
    paddle_asgd::asgd_norm_cpu(plan.step(here), &expected);
    const Memory sum(sizeof(double));
    sum.upload(&got);
    succeed(paddle_asgd::asgd_norm_cuda(device_step(there, Form::kValues, false), sum.at<double>(), 0, stream));
    CUDA(cudaStreamSynchronize(stream));
    sum.download(&got);
    tally->count();
    if (!close(got, expected)) {
      tally->differ(where + ": norm " + std::to_string(got) + ", not " + std::to_string(expected));
    }
  }

  const Tensors& tensors() const { return tensors_; }
  Mirrored& mirrored() { return mirrored_; }

  Plan plan;
  Numbers known;
  cudaStream_t stream;

 private:
  Tensors tensors_;
  Mirrored mirrored_;
  Memory numbers_, weights_, watch_;
};

}  // namespace gpu
