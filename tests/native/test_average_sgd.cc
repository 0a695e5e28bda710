// SPDX-License-Identifier: Apache-2.0
// The kernels of averaged SGD driven with raw buffers: which memory they write, and that each element gets what
// average_formula.h says. Must not write the formula again. `test_average_sgd cpu` tests the CPU's kernel,
// `test_average_sgd cuda` the other; `test_average_sgd cpu checksums` prints one line for each combination of types and
// mode instead, to compare kernels and builds.
#include <string>
#include <vector>

#include "average_sgd_kernel.h"
#include "tensors.h"

namespace native_test {
namespace {

using paddle_asgd::AveragedSgdCoefficients;
using paddle_asgd::AveragedSgdStep;
using paddle_asgd::AveragedSgdTensor;
using paddle_asgd::GradientRow;
using paddle_asgd::GradientRows;
using paddle_asgd::Scalar;

constexpr double kRate = 0.075, kDecay = 0.3, kLambd = 0.4, kAlpha = 0.75;
constexpr int64_t kT0 = 3;

struct Mode {
  const char* name;
  bool averages;
  bool own_t0;
  double sign;
  bool keeps_eta;
  DType eta;
};
constexpr Mode kModes[] = {{"no average", false, false, 1, false, DType::kFloat64},
                           {"average", true, false, 1, false, DType::kFloat64},
                           {"average, own t0, climbing", true, true, -1, false, DType::kFloat64},
                           {"average, eta kept", true, false, 1, true, DType::kFloat64},
                           {"average, eta kept in float32", true, true, -1, true, DType::kFloat32}};

// One parameter with gradient and state. Offsets differ between its buffers, so that none is aligned like another.
struct Averaged {
  Averaged(const Types& types_, const Mode& mode_, int64_t numel_, int64_t offset)
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
  Mode mode;
  int64_t numel;
  Buffer param, grad, ax, master;
  Buffer clock;  // of int64, which is as wide as what the buffer takes it for
  Buffer t0, eta;
};

using List = std::vector<std::unique_ptr<Averaged>>;

bool on_cuda = false;

Scalar number(double value) { return Scalar{nullptr, DType::kFloat64, value}; }

AveragedSgdStep step_of(const std::vector<AveragedSgdTensor>& args, const Mode& mode) {
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

void run(const AveragedSgdStep& step) {
  if (!on_cuda) return paddle_asgd::average_sgd_cpu(step);
  const char* error = paddle_asgd::average_sgd_cuda(step, 0, nullptr);
  CHECK(error == nullptr, "%s", error);
}

std::vector<AveragedSgdTensor> args_of(const List& list) {
  std::vector<AveragedSgdTensor> args;
  for (const auto& t : list) args.push_back(t->args());
  return args;
}

void take_step(const List& list, const Mode& mode) {
  const auto args = args_of(list);
  run(step_of(args, mode));
}

void add(List* list, const Types& types, const Mode& mode, int64_t numel, int64_t offset, Random* random) {
  list->emplace_back(new Averaged(types, mode, numel, offset));
  Averaged& t = *list->back();
  for (int64_t e = 0; e < numel; ++e) {
    const double value = random->number();
    t.param.put(e, value);
    if (types.master) t.master.put(e, value);
  }
}

// Depends on the weight, the step and the element.
void set_gradients(const List& list, Random* random) {
  for (const auto& t : list) {
    for (int64_t e = 0; e < t->numel; ++e) t->grad.put(e, 0.375 * t->param.at(e) + random->number());
  }
}

// What one tensor held before a step.
struct Before {
  explicit Before(const Averaged& t)
      : steps(*t.steps()), eta(t.mode.keeps_eta ? t.eta.at(0) : 0), ax(t.ax.bytes()), weights(t.weights().bytes()) {}
  int64_t steps;
  double eta;
  std::string ax, weights;
};

double rounded(const Mode& mode, double value) {
  return mode.eta == DType::kFloat32 ? static_cast<double>(static_cast<float>(value)) : value;
}

double eta_after(int64_t steps) { return paddle_asgd::averaged_sgd_eta(kRate, kLambd, kAlpha, steps); }

template <typename T>
void check_elements(const Averaged& t, const Before& before) {
  const Mode& mode = t.mode;
  const double kept = before.steps == 0 ? rounded(mode, kRate) : before.eta;
  const double eta = mode.keeps_eta ? kept : eta_after(before.steps);
  const double mu = rounded(mode, paddle_asgd::averaged_sgd_mu(mode.own_t0 ? kT0 + 1 : kT0, before.steps));
  const AveragedSgdCoefficients<T> c{static_cast<T>(1 - kLambd * eta), static_cast<T>(-eta), static_cast<T>(kDecay),
                                     static_cast<T>(mode.sign), static_cast<T>(mu)};
  const DType stored = t.types.master ? DType::kFloat32 : t.types.param;
  Buffer narrowed(t.types.param, 1);
  for (int64_t e = 0; e < t.numel; ++e) {
    const auto where = [&]() {
      return std::string(t.types.name) + ", " + mode.name + ", step " + std::to_string(before.steps) + ", element " +
             std::to_string(e) + " of " + std::to_string(t.numel);
    };
    const T old = static_cast<T>(Buffer::read(before.weights.data(), stored, e)), g = static_cast<T>(t.grad.at(e));
    const T x = paddle_asgd::descend_averaged<T>(old, g, c);
    narrowed.put(0, x);
    CHECK(same(t.param.at(e), narrowed.at(0)), "%s: %a, not %a", where().c_str(), t.param.at(e), narrowed.at(0));
    CHECK(!t.types.master || same(t.master.at(e), x), "%s: %a, not %a", where().c_str(), t.master.at(e), double(x));
    if (!mode.averages) continue;
    const T followed = t.types.master ? x : static_cast<T>(narrowed.at(0));
    const T ax = static_cast<T>(Buffer::read(before.ax.data(), t.types.compute(), e));
    const T expected = paddle_asgd::average<T>(ax, followed, c.mu);
    CHECK(same(t.ax.at(e), expected), "%s: %a, not %a", where().c_str(), t.ax.at(e), double(expected));
  }
}

void check_step(const Averaged& t, const Before& before) {
  CHECK(*t.steps() == before.steps + 1, "%s: clock %ld", t.types.name, static_cast<long>(*t.steps()));
  if (t.mode.keeps_eta) {
    const double next = rounded(t.mode, eta_after(before.steps + 1));
    CHECK(t.eta.at(0) == next, "%s: eta %a, not %a", t.types.name, t.eta.at(0), next);
  }
  t.types.compute() == DType::kFloat64 ? check_elements<double>(t, before) : check_elements<float>(t, before);
}

void check_steps(const List& list, const Mode& mode, Random* random, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    set_gradients(list, random);
    std::vector<Before> before;
    for (const auto& t : list) before.emplace_back(*t);
    take_step(list, mode);
    for (size_t i = 0; i < list.size(); ++i) check_step(*list[i], before[i]);
  }
}

void check_every_step() {
  for (const Types& types : kTypes) {
    for (const Mode& mode : kModes) {
      // Offsets 0 and 1: 16-byte accesses are possible, or are not.
      for (const int64_t offset : {0, 1}) {
        Random random(1);
        List list;
        // Empty tensors first, in the middle and last; one of more than a chunk and a block.
        for (const int64_t numel : {0, 1, 63, 0, 65, 257, 8193, 64, 0}) add(&list, types, mode, numel, offset, &random);
        check_steps(list, mode, &random, 7);
      }
    }
  }
}

// Tensors of all types in turn, with clocks of their own: more than a launch takes.
void check_many_tensors() {
  for (const Mode& mode : {kModes[2], kModes[4]}) {
    Random random(2);
    List list;
    for (int64_t i = 0; i < 2603; ++i) {
      add(&list, kTypes[i % 10], mode, i % 7 == 3 ? 0 : i % 11, i % 3, &random);
      *list.back()->steps() = i % 5;
      if (mode.keeps_eta) list.back()->eta.put(0, 0.01 * static_cast<double>(i % 13));
    }
    check_steps(list, mode, &random, 2);
  }
}

// An Inf that was found leaves everything as it was.
void check_found_inf() {
  Random random(3);
  List list;
  for (const Types& types : kTypes) add(&list, types, kModes[3], 65, 0, &random);
  set_gradients(list, &random);
  std::string before, after;
  for (const auto& t : list) before += t->bytes();
  const auto args = args_of(list);
  const bool found = true;
  AveragedSgdStep step = step_of(args, kModes[3]);
  step.found_inf = &found;
  run(step);
  for (const auto& t : list) after += t->bytes();
  CHECK(before == after, "a step that found an Inf has written");
}

// Rows as a sparse gradient has them, beside the dense gradient that they stand for.
void check_gradient_rows() {
  for (const Types& types : kTypes) {
    const int64_t height = 40, width = 77;
    Random random(4);
    List dense, sparse;
    add(&dense, types, kModes[1], height * width, 0, &random);
    Random again(4);
    add(&sparse, types, kModes[1], height * width, 0, &again);
    for (int64_t k = 0; k < 6; ++k) {
      const std::vector<GradientRow> rows = {{k, 0}, {11 + k, 2}, {39, 1}};
      for (int64_t e = 0; e < height * width; ++e) dense[0]->grad.put(e, 0);
      for (const GradientRow& entry : rows) {
        for (int64_t j = 0; j < width; ++j) {
          const double value = random.quarter();
          dense[0]->grad.put(entry.row * width + j, value);
          sparse[0]->grad.put(entry.position * width + j, value);
        }
      }
      take_step(dense, kModes[1]);
      const GradientRows given[] = {{rows.data(), rows.data() + rows.size(), width}};
      const auto args = args_of(sparse);
      AveragedSgdStep step = step_of(args, kModes[1]);
      step.gradient_rows = given;
      run(step);
      CHECK(dense[0]->bytes() == sparse[0]->bytes(), "%s, step %ld", types.name, static_cast<long>(k));
    }
  }
}

void print_checksums() {
  for (const Types& types : kTypes) {
    for (const Mode& mode : kModes) {
      uint64_t hash = 14695981039346656037u;  // FNV-1a
      Random random(9);
      List list;
      for (const int64_t numel : {0, 1, 63, 64, 65, 1291}) add(&list, types, mode, numel, 0, &random);
      for (int64_t step = 0; step < 12; ++step) {
        set_gradients(list, &random);
        take_step(list, mode);
      }
      for (const auto& t : list) {
        for (const char byte : t->bytes()) hash = (hash ^ static_cast<uint8_t>(byte)) * 1099511628211u;
      }
      std::printf("%s, %s: %016lx\n", types.name, mode.name, hash);
    }
  }
}

}  // namespace
}  // namespace native_test

int main(int argc, char** argv) {
  using namespace native_test;
  const std::string kernel = argc > 1 ? argv[1] : "";
  CHECK(kernel == "cpu" || kernel == "cuda", "received '%s', expected cpu or cuda", kernel.c_str());
  on_cuda = kernel == "cuda";
  if (argc > 2) {
    print_checksums();
    return 0;
  }
  check_every_step();
  check_many_tensors();
  check_found_inf();
  if (!on_cuda) check_gradient_rows();
  return 0;
}
