// SPDX-License-Identifier: Apache-2.0
// Makes tensors and steps, and hands them to the kernel that was chosen. Must not check anything but errors.
#pragma once

#include <initializer_list>

#include "asgd_watch.h"
#include "tensors.h"

namespace native_test {

using paddle_asgd::Scalar;
using paddle_asgd::StepArgs;
using paddle_asgd::TensorArgs;
using paddle_asgd::Visit;

constexpr double kRate = 0.075, kDecay = 0.3;

inline Scalar number(double value) { return Scalar{nullptr, DType::kFloat64, value}; }

inline StepArgs step_args(const std::vector<TensorArgs>& args, int64_t n) {
  StepArgs step{};
  step.tensors = args.data();
  step.count = static_cast<int64_t>(args.size());
  step.batch_num = n;
  step.learning_rate = number(kRate);
  step.weight_decay = number(kDecay);
  return step;
}

// How the kernels choose slots, weigh them and descend.
struct Mode {
  const char* name;
  bool indexed;
  bool weighted;
  double theta;  // 0: none
};
constexpr Mode kModes[] = {{"cyclic", false, false, 0},
                           {"cyclic theta 0.3", false, false, 0.3},
                           {"cyclic theta 1", false, false, 1},
                           {"cyclic weighted", false, true, 0},
                           {"cyclic weighted theta 0.3", false, true, 0.3},
                           {"cyclic weighted theta 1", false, true, 1},
                           {"indexed", true, false, 0},
                           {"indexed theta 0.3", true, false, 0.3},
                           {"indexed theta 1", true, false, 1},
                           {"indexed weighted", true, true, 0},
                           {"indexed weighted theta 0.3", true, true, 0.3},
                           {"indexed weighted theta 1", true, true, 1}};

// What a step is given besides its tensors, in memory between guard bytes.
struct Plan {
  Plan(const Mode& mode_, int64_t n_, uint64_t seed)
      : mode(mode_),
        n(n_),
        random(seed),
        weights(DType::kFloat64, mode.weighted ? n : 0),
        watch(DType::kFloat64, paddle_asgd::kWatchSize) {
    // Of mean 1, and one is up to eleven times another.
    double sum = 0;
    for (int64_t i = 0; mode.weighted && i < n; ++i) weights.put(i, 100.0 + random.next() % 1000), sum += weights.at(i);
    for (int64_t i = 0; mode.weighted && i < n; ++i) weights.put(i, weights.at(i) * n / sum);
    draw();
  }
  // With replacement: some slots come again before others have come once.
  void draw() { slot = static_cast<int64_t>(random.next() % n); }

  const double* batch_weights() const { return static_cast<const double*>(weights.data()); }
  double* watch_sums() const { return static_cast<double*>(watch.data()); }

  StepArgs step(const std::vector<TensorArgs>& args) const {
    StepArgs step = step_args(args, n);
    step.batch_index = {mode.indexed, nullptr, slot};
    step.batch_weights = batch_weights();
    step.has_theta = mode.theta != 0;
    step.theta = number(mode.theta);
    step.watch = watches ? watch_sums() : nullptr;
    return step;
  }

  // What the step finds in a clock `m`.
  Visit visit(const int64_t* m) const {
    return mode.indexed ? paddle_asgd::indexed_visit(m, slot, n) : paddle_asgd::cyclic_visit(m[0], n);
  }

  Mode mode;
  int64_t n;
  Random random;
  int64_t slot;
  Buffer weights;
  Buffer watch;
  bool watches = false;
};

inline std::vector<TensorArgs> args_of(const Tensors& tensors) {
  std::vector<TensorArgs> args;
  for (const auto& tensor : tensors) args.push_back(tensor->args());
  return args;
}

// Everything that a step may change, tensor by tensor.
inline std::vector<std::string> bytes_of(const Tensors& tensors) {
  std::vector<std::string> bytes;
  for (const auto& tensor : tensors) bytes.push_back(tensor->bytes());
  return bytes;
}

inline bool on_cuda = false;

// The first argument of a program of tests: cpu or cuda.
inline void choose_kernel(int argc, char** argv) {
  const std::string kernel = argc > 1 ? argv[1] : "";
  CHECK(kernel == "cpu" || kernel == "cuda", "received '%s', expected cpu or cuda", kernel.c_str());
  on_cuda = kernel == "cuda";
}

inline void run(const StepArgs& step) {
  if (!on_cuda) return paddle_asgd::asgd_cpu(step);
  succeed(paddle_asgd::asgd_cuda(step, 0, nullptr));
}

inline void take_step(const Tensors& tensors, int64_t n) {
  const auto args = args_of(tensors);
  run(step_args(args, n));
}

inline void take_step(const Tensors& tensors, const Plan& plan) {
  const auto args = args_of(tensors);
  run(plan.step(args));
}

// One tensor of zeros.
inline Tensors make_one(const Types& types, int64_t numel, int64_t n, int64_t offset = 0, bool indexed = false) {
  Tensors tensors;
  tensors.emplace_back(new Tensor(types, numel, n, offset, indexed));
  return tensors;
}

inline Tensors make(const Types& types, const std::vector<int64_t>& sizes, int64_t n, int64_t offset, Random* random,
                    bool indexed = false) {
  Tensors tensors;
  for (const int64_t numel : sizes) {
    tensors.emplace_back(new Tensor(types, numel, n, offset, indexed));
    for (int64_t e = 0; e < numel; ++e) tensors.back()->set_weight(e, random->number());
  }
  return tensors;
}

// Tensors of all types and histories in turn, none of them of its neighbour's size. 2,603 are more than a launch takes
// of four pairs of types, and what is left of them takes short arguments.
inline Tensors make_many(int64_t count, int64_t n, Random* random, bool indexed) {
  Tensors tensors;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t numel = i % 7 == 3 ? 0 : i % 11;
    const Types& types = i % 8 == 7 ? kNarrowTypes[i / 8 % 10] : kTypes[i % 10];
    tensors.push_back(std::move(make(types, {numel}, n, i % 3, random, indexed)[0]));
  }
  return tensors;
}

// Depends on the weight, the step and the element.
inline void set_gradients(Tensor* t, Random* random) {
  for (int64_t e = 0; e < t->numel; ++e) t->grad.put(e, 0.375 * t->param.at(e) + random->number());
}

inline void set_gradients(const Tensors& tensors, Random* random) {
  for (const auto& t : tensors) set_gradients(t.get(), random);
}

// In the order in which both kernels add, with the weights as the step rounds them.
inline double sum_of_history(const Tensor& t, int64_t n, int64_t e, const double* weights = nullptr) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double stored = t.stored(i, e);
    if (weights == nullptr) {
      sum += stored;
    } else {
      sum += (t.types.compute() == DType::kFloat64 ? weights[i] : static_cast<float>(weights[i])) * stored;
    }
  }
  return sum;
}

}  // namespace native_test
