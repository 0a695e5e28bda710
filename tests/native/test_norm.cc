// SPDX-License-Identifier: Apache-2.0
// asgd_norm_cpu and asgd_norm_cuda: the squares of what the histories know of the gradient. Must not test the step.
// `test_norm cpu` tests the CPU's kernel, `test_norm cuda` the other.
#include "asgd_formula.h"
#include "asgd_slots.h"
#include "driver.h"

namespace native_test {
namespace {

double norm(const StepArgs& step, double sum) {
  Buffer total(DType::kFloat64, 1);
  total.put(0, sum);
  double* memory = static_cast<double*>(total.data());
  if (!on_cuda) {
    paddle_asgd::asgd_norm_cpu(step, memory);
  } else {
    succeed(paddle_asgd::asgd_norm_cuda(step, memory, 0, nullptr));
  }
  return total.at(0);
}

double expected_norm(const Tensors& tensors, const Plan& plan) {
  double sum = 0;
  for (const auto& t : tensors) {
    const double known = paddle_asgd::weight_known(t->m(), plan.mode.indexed, plan.n, plan.batch_weights());
    for (int64_t e = 0; known != 0 && e < t->numel; ++e) {
      const double x = t->weights().at(e), d = t->d.at(e);
      const double gradient = t->types.compute() == DType::kFloat64
                                  ? paddle_asgd::known_gradient<double>(x, d, kDecay, known)
                                  : paddle_asgd::known_gradient<float>(x, d, kDecay, known);
      sum += gradient * gradient;
    }
  }
  return sum;
}

void check_norm(const Tensors& tensors, const Plan& plan) {
  const auto args = args_of(tensors);
  StepArgs step = plan.step(args);
  // Of the index the norm may use no more than that there is one.
  step.batch_index.value = -1;
  const auto bytes = bytes_of(tensors);
  const double got = norm(step, 0.5), expected = 0.5 + expected_norm(tensors, plan);
  CHECK(close(got, expected), "%s, %s: %.17g, not %.17g", tensors[0]->types.name, plan.mode.name, got, expected);
  for (size_t i = 0; i < tensors.size(); ++i) CHECK(tensors[i]->bytes() == bytes[i], "tensor %zu", i);
}

// Every third tensor has not been stepped yet, and has a sum that must not be read.
void take_steps(const Tensors& tensors, Plan* plan, int64_t steps) {
  std::vector<TensorArgs> args;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (i % 3 != 1) args.push_back(tensors[i]->args());
    for (int64_t e = 0; i % 3 == 1 && e < tensors[i]->numel; ++e) tensors[i]->d.put(e, 3);
  }
  for (int64_t step = 0; step < steps; ++step) {
    set_gradients(tensors, &plan->random);
    plan->draw();
    run(plan->step(args));
  }
}

void check_every_norm() {
  for (const Types& types : kTypes) {
    for (const Mode& mode : kModes) {
      if (mode.theta != 0) continue;  // the norm does not ask
      Plan plan(mode, 7, 21);
      const Tensors tensors = make(types, {0, 65, 4099, 1, 257, 8193, 0}, 7, 1, &plan.random, mode.indexed);
      check_norm(tensors, plan);
      take_steps(tensors, &plan, 4);
      check_norm(tensors, plan);
      take_steps(tensors, &plan, 17);
      check_norm(tensors, plan);
      // A damaged counter is a whole pass.
      for (const auto& t : tensors) t->m()[mode.indexed ? 1 : 0] = -5;
      check_norm(tensors, plan);
    }
  }
}

void check_many_tensors() {
  for (const Mode& mode : {kModes[0], kModes[9]}) {
    Plan plan(mode, 3, 22);
    const Tensors tensors = make_many(603, 3, &plan.random, mode.indexed);
    take_steps(tensors, &plan, 2);
    check_norm(tensors, plan);
  }
}

// Worked by hand, with learning rate or not: (6 / 3 + 0.25 * 4)^2 + (-3 / 3 + 0.25 * 2)^2 = 9.25.
void check_worked_example() {
  for (const Types& types : kTypes) {
    const Tensors tensors = make_one(types, 2, 7);
    tensors[0]->set_weight(0, 4), tensors[0]->set_weight(1, 2);
    tensors[0]->d.put(0, 6), tensors[0]->d.put(1, -3);
    if (types.master) tensors[0]->param.put(0, 100);  // only a copy
    tensors[0]->m()[0] = 3;
    const auto args = args_of(tensors);
    StepArgs step = step_args(args, 7);
    const float decay = 0.25f;
    step.weight_decay = Scalar{&decay, DType::kFloat32, NAN};
    CHECK(norm(step, 1) == 10.25, "%s: %g", types.name, norm(step, 1));
  }
}

// More blocks than the GPU's kernel starts. Multiples of 1/64 below 2^47: exact in any order.
void check_many_elements() {
  Random random(23);
  Tensors tensors;
  double expected = 0;
  for (const int64_t numel : {int64_t{1023} * 4096 + 5, int64_t{3} * 4096 + 1}) {
    tensors.emplace_back(new Tensor(kTypes[0], numel, 1, 0));
    tensors.back()->m()[0] = 2;
    float* d = static_cast<float*>(tensors.back()->d.data());
    float* x = static_cast<float*>(tensors.back()->param.data());
    for (int64_t e = 0; e < numel; ++e) {
      d[e] = static_cast<float>(random.quarter()), x[e] = static_cast<float>(e % 5);
      expected += (d[e] + 0.5 * x[e]) * (d[e] + 0.5 * x[e]);
    }
  }
  const auto args = args_of(tensors);
  StepArgs step = step_args(args, 1);
  step.weight_decay = number(0.5);
  CHECK(norm(step, 0) == expected, "%.17g, not %.17g", norm(step, 0), expected);
}

}  // namespace
}  // namespace native_test

int main(int argc, char** argv) {
  using namespace native_test;
  choose_kernel(argc, argv);
  CHECK(norm(step_args({}, 3), 0.5) == 0.5, "no tensors");
  check_worked_example();
  check_every_norm();
  check_many_tensors();
  check_many_elements();
  return 0;
}
