// SPDX-License-Identifier: Apache-2.0
// The kernels of averaged SGD driven with raw buffers: which memory they write, and that each element gets what
// average_formula.h says. Must not write the formula again. `test_average_sgd cpu` tests the CPU's kernel,
// `test_average_sgd cuda` the other; `test_average_sgd cpu checksums` prints one line for each combination of types and
// mode instead, to compare kernels and builds.
#include <string>
#include <vector>

#include "averaged.h"

namespace native_test {
namespace {

using paddle_asgd::AveragedSgdCoefficients;
using paddle_asgd::AveragedSgdStep;
using paddle_asgd::GradientRow;
using paddle_asgd::GradientRows;

using List = AveragedList;

bool on_cuda = false;

void run(const AveragedSgdStep& step) {
  if (!on_cuda) return paddle_asgd::average_sgd_cpu(step);
  const char* error = paddle_asgd::average_sgd_cuda(step, 0, nullptr);
  CHECK(error == nullptr, "%s", error);
}

void take_step(const List& list, const AveragedMode& mode) {
  const auto args = averaged_args(list);
  run(step_of(args, mode));
}

// What one tensor held before a step.
struct Before {
  explicit Before(const Averaged& t)
      : steps(*t.steps()), eta(t.mode.keeps_eta ? t.eta.at(0) : 0), ax(t.ax.bytes()), weights(t.weights().bytes()) {}
  int64_t steps;
  double eta;
  std::string ax, weights;
};

double rounded(const AveragedMode& mode, double value) {
  return mode.eta == DType::kFloat32 ? static_cast<double>(static_cast<float>(value)) : value;
}

double eta_after(int64_t steps) { return paddle_asgd::averaged_sgd_eta(kRate, kLambd, kAlpha, steps); }

template <typename T>
void check_elements(const Averaged& t, const Before& before) {
  const AveragedMode& mode = t.mode;
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

void check_steps(const List& list, const AveragedMode& mode, Random* random, int64_t steps) {
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
    for (const AveragedMode& mode : kAveragedModes) {
      // Offsets 0 and 1: 16-byte accesses are possible, or are not.
      for (const int64_t offset : {0, 1}) {
        Random random(1);
        List list;
        // Empty tensors first, in the middle and last; one of more than a chunk and a block.
        for (const int64_t numel : {0, 1, 63, 0, 65, 257, 8193, 64, 0})
          add_averaged(&list, types, mode, numel, offset, &random);
        check_steps(list, mode, &random, 7);
      }
    }
  }
}

void check_many_tensors() {
  for (const AveragedMode& mode : {kAveragedModes[2], kAveragedModes[4]}) {
    Random random(2);
    const List list = many_averaged(mode, &random);
    check_steps(list, mode, &random, 2);
  }
}

// An Inf that was found leaves everything as it was.
void check_found_inf() {
  Random random(3);
  List list;
  for (const Types& types : kTypes) add_averaged(&list, types, kAveragedModes[3], 65, 0, &random);
  set_gradients(list, &random);
  std::string before, after;
  for (const auto& t : list) before += t->bytes();
  const auto args = averaged_args(list);
  const bool found = true;
  AveragedSgdStep step = step_of(args, kAveragedModes[3]);
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
    add_averaged(&dense, types, kAveragedModes[1], height * width, 0, &random);
    Random again(4);
    add_averaged(&sparse, types, kAveragedModes[1], height * width, 0, &again);
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
      take_step(dense, kAveragedModes[1]);
      const GradientRows given[] = {{rows.data(), rows.data() + rows.size(), width}};
      const auto args = averaged_args(sparse);
      AveragedSgdStep step = step_of(args, kAveragedModes[1]);
      step.gradient_rows = given;
      run(step);
      CHECK(dense[0]->bytes() == sparse[0]->bytes(), "%s, step %ld", types.name, static_cast<long>(k));
    }
  }
}

void print_checksums() {
  for (const Types& types : kTypes) {
    for (const AveragedMode& mode : kAveragedModes) {
      uint64_t hash = 14695981039346656037u;  // FNV-1a
      Random random(9);
      List list;
      for (const int64_t numel : {0, 1, 63, 64, 65, 1291}) add_averaged(&list, types, mode, numel, 0, &random);
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
