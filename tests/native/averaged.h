// SPDX-License-Identifier: Apache-2.0
// Parameters of averaged SGD for the tests of its kernels: filled, and listed as the kernels take them. Must not know
// what is expected of a kernel.
#pragma once

#include "average_sgd_kernel.h"
#include "tensors.h"

namespace native_test {

using paddle_asgd::AveragedSgdStep;
using paddle_asgd::AveragedSgdTensor;
using paddle_asgd::Scalar;

constexpr double kRate = 0.075, kDecay = 0.3, kLambd = 0.4, kAlpha = 0.75;
constexpr int64_t kT0 = 3;

struct AveragedMode {
  const char* name;
  bool averages;
  bool own_t0;
  double sign;
  bool keeps_eta;
  DType eta;
};
constexpr AveragedMode kAveragedModes[] = {{"no average", false, false, 1, false, DType::kFloat64},
                                           {"average", true, false, 1, false, DType::kFloat64},
                                           {"average, own t0, climbing", true, true, -1, false, DType::kFloat64},
                                           {"average, eta kept", true, false, 1, true, DType::kFloat64},
                                           {"average, eta kept in float32", true, true, -1, true, DType::kFloat32}};

// One parameter with gradient and state. Offsets differ between its buffers, so that none is aligned like another.
struct Averaged {
  Averaged(const Types& types_, const AveragedMode& mode_, int64_t numel_, int64_t offset)
      : types(types_),
        mode(mode_),
        numel(numel_),
        param(types.param, numel, offset),
        grad(types.grad, numel, 2 * offset),
        ax(types.compute(), mode.averages ? numel : 0, 3 * offset),
        master(DType::kFloat32, types.master ? numel : 0, 3 * offset),
        clock(DType::kFloat64, 1, offset),
        t0(DType::kFloat64, mode.own_t0 ? 1 : 0),
        eta(mode.eta, mode.keeps_eta ? 1 : 0) {
    if (mode.own_t0) t0.put(0, kT0 + 1);
  }
  const Buffer& weights() const { return types.master ? master : param; }
  int64_t* steps() const { return static_cast<int64_t*>(clock.data()); }
  std::string bytes() const {
    return param.bytes() + ax.bytes() + master.bytes() + clock.bytes() + eta.bytes() + t0.bytes();
  }
  AveragedSgdTensor args() const {
    return {param.data(), grad.data(),
            ax.data(),    types.master ? master.data() : nullptr,
            steps(),      static_cast<const double*>(t0.data()),
            eta.data(),   numel,
            types.param,  types.grad};
  }

  Types types;
  AveragedMode mode;
  int64_t numel;
  Buffer param, grad, ax, master;
  Buffer clock;  // of int64, which is as wide as what the buffer takes it for
  Buffer t0, eta;
};

using AveragedList = std::vector<std::unique_ptr<Averaged>>;

inline Scalar number(double value) { return Scalar{nullptr, DType::kFloat64, value}; }

inline AveragedSgdStep step_of(const std::vector<AveragedSgdTensor>& args, const AveragedMode& mode) {
  AveragedSgdStep step{};
  step.tensors = args.data();
  step.count = static_cast<int64_t>(args.size());
  step.learning_rate = number(kRate);
  step.weight_decay = number(kDecay);
  step.lambd = number(kLambd);
  step.alpha = number(kAlpha);
  step.t0 = number(kT0);
  step.sign = number(mode.sign);
  step.eta_dtype = mode.eta;
  return step;
}

inline std::vector<AveragedSgdTensor> averaged_args(const AveragedList& list) {
  std::vector<AveragedSgdTensor> args;
  for (const auto& t : list) args.push_back(t->args());
  return args;
}

inline void add_averaged(AveragedList* list, const Types& types, const AveragedMode& mode, int64_t numel,
                         int64_t offset, Random* random) {
  list->emplace_back(new Averaged(types, mode, numel, offset));
  Averaged& t = *list->back();
  for (int64_t e = 0; e < numel; ++e) {
    const double value = random->number();
    t.param.put(e, value);
    if (types.master) t.master.put(e, value);
  }
}

// Depends on the weight, the step and the element.
inline void set_gradients(const AveragedList& list, Random* random) {
  for (const auto& t : list) {
    for (int64_t e = 0; e < t->numel; ++e) t->grad.put(e, 0.375 * t->param.at(e) + random->number());
  }
}

// Tensors of all types in turn, with clocks of their own: more than a launch takes.
inline AveragedList many_averaged(const AveragedMode& mode, Random* random) {
  AveragedList list;
  for (int64_t i = 0; i < 2603; ++i) {
    add_averaged(&list, kTypes[i % 10], mode, i % 7 == 3 ? 0 : i % 11, i % 3, random);
    *list.back()->steps() = i % 5;
    if (mode.keeps_eta) list.back()->eta.put(0, 0.01 * static_cast<double>(i % 13));
  }
  return list;
}

}  // namespace native_test
