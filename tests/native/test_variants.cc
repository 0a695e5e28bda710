// SPDX-License-Identifier: Apache-2.0
// What the step and its variants (batch_index, batch_weights, theta) promise whatever the formula looks like: worked
// numbers, and that each variant is the plain step where it says the same. Must not compute an expected value by
// asgd_formula.h. `test_variants cpu` tests the CPU's kernel, `test_variants cuda` the other.
#include "driver.h"

namespace native_test {
namespace {

struct Row {
  int64_t slot;
  double g, d, x;
};
struct Example {
  const char* name;
  bool indexed;
  double theta;
  double weights[3];
  Row rows[5];
};

// Worked in fractions, exact in float32: learning_rate 3/4, weight_decay 1/4, n = 3, x = 2 at first.
constexpr Example kExamples[] = {{"SAG",
                                  false,
                                  0,
                                  {},
                                  {{0, 4, 4, -1.375},
                                   {1, -2, 2, -1.8671875},
                                   {2, 1, 3, -2.26708984375},
                                   {0, 3, 2, -2.342010498046875},
                                   {1, -1, 3, -2.652883529663086}}},
                                 {"cyclic weighted",
                                  false,
                                  0,
                                  {0.5, 1, 1.5},
                                  {{0, 4, 2, -1.375},
                                   {1, -2, 0, -1.1171875},
                                   {2, 1, 1.5, -1.28271484375},
                                   {0, 3, 1, -1.292205810546875},
                                   {1, -1, 2, -1.549917221069336}}},
                                 {"indexed weighted",
                                  true,
                                  0,
                                  {0.5, 1, 1.5},
                                  {{2, 4, 6, -1.375},
                                   {0, -2, 5, -2.9921875},
                                   {2, 1, 0.5, -2.61865234375},
                                   {1, 3, 3.5, -3.002655029296875},
                                   {0, -1, 4, -3.439657211303711}}},
                                 {"indexed",
                                  true,
                                  0,
                                  {},
                                  {{2, 4, 4, -1.375},
                                   {0, -2, 2, -1.8671875},
                                   {2, 1, -1, -1.14208984375},
                                   {1, 3, 2, -1.427947998046875},
                                   {0, -1, 3, -1.910207748413086}}},
                                 {"SAGA",
                                  false,
                                  1,
                                  {},
                                  {{0, 4, 4, -1.375},
                                   {1, -2, 2, -1.1171875},
                                   {2, 1, 3, -2.15771484375},
                                   {0, 3, 2, -1.753143310546875},
                                   {1, -1, 3, -2.674428939819336}}},
                                 {"indexed weighted, half of SAGA",
                                  true,
                                  0.5,
                                  {0.5, 1, 1.5},
                                  {{2, 4, 6, -0.625},
                                   {0, -2, 5, -2.3828125},
                                   {2, 1, 0.5, -2.12353515625},
                                   {1, 3, 3.5, -2.975372314453125},
                                   {0, -1, 4, -3.479990005493164}}}};

void check_worked_examples() {
  for (const Types& types : kTypes) {
    if (types.param != types.compute() && !types.master) continue;  // would be rounded
    for (const Example& example : kExamples) {
      Plan plan({example.name, example.indexed, example.weights[0] != 0, example.theta}, 3, 1);
      for (int64_t i = 0; plan.mode.weighted && i < 3; ++i) plan.weights.put(i, example.weights[i]);
      const Tensors tensors = make_one(types, 5, 3, 1, example.indexed);
      Tensor& t = *tensors[0];
      t.set_weights(2);
      const auto args = args_of(tensors);
      for (const Row& row : example.rows) {
        t.grad.fill(row.g);
        plan.slot = row.slot;
        StepArgs step = plan.step(args);
        step.learning_rate = number(0.75);
        step.weight_decay = number(0.25);
        run(step);
        for (int64_t e = 0; e < 5; ++e) {
          CHECK(t.d.at(e) == row.d && t.weights().at(e) == row.x && t.y.at(row.slot * 5 + e) == row.g, "%s, %s: %a %a",
                types.name, example.name, t.d.at(e), t.weights().at(e));
        }
      }
    }
  }
}

// Two plans for the same gradients, with `change` made to each step of the second: they must agree in every element,
// in every bit where `tolerance` is 0.
template <typename Change>
void check_alike(const Types& types, int64_t n, const Mode& first, const Mode& second, double tolerance,
                 const Change& change) {
  Plan plans[] = {{first, n, 2}, {second, n, 2}};
  Tensors tensors[2];
  std::vector<TensorArgs> args[2];
  for (int k = 0; k < 2; ++k) {
    Random random(3);
    tensors[k] = make(types, {0, 65, 1095}, n, k, &random, plans[k].mode.indexed);
    args[k] = args_of(tensors[k]);
  }
  // At least a window of refreshes and a pass.
  for (int64_t m = 0; m < 9 * n + 2; ++m) {
    for (int k = 0; k < 2; ++k) {
      Random random(100 + m);
      set_gradients(tensors[k], &random);
      StepArgs step = plans[k].step(args[k]);
      if (k == 1) change(m, &step);
      run(step);
      plans[k].draw();
    }
    for (size_t i = 0; i < tensors[0].size(); ++i) {
      const Tensor &a = *tensors[0][i], &b = *tensors[1][i];
      CHECK(tolerance != 0 || a.elements() == b.elements(), "%s, %s, n %ld, step %ld", types.name, second.name, n, m);
      for (int64_t e = 0; e < a.numel; ++e) {
        const double x = a.param.at(e), other = b.param.at(e);
        CHECK(std::abs(x - other) <= tolerance, "%s, %s, n %ld, step %ld: %a, not %a", types.name, second.name, n, m,
              other, x);
      }
    }
  }
}

// An index that goes round is the cycle; weights that all are 1 are none.
void check_same_bits() {
  for (const Types& types : kTypes) {
    for (const int64_t n : {1, 3, 9}) {
      for (const double theta : {0.0, 1.0}) {
        const Mode cyclic = {"cyclic", false, false, theta}, cyclic_weighted = {"cyclic weighted", false, true, theta};
        const auto go_round = [n](int64_t m, StepArgs* step) { step->batch_index = {true, nullptr, m % n}; };
        check_alike(types, n, cyclic, {"index that goes round", true, false, theta}, 0, go_round);
        check_alike(types, n, cyclic_weighted, {"index that goes round, weighted", true, true, theta}, 0, go_round);
        const std::vector<double> ones(n, 1);
        check_alike(types, n, cyclic, {"weights 1", false, false, theta}, 0,
                    [&ones](int64_t, StepArgs* step) { step->batch_weights = ones.data(); });
      }
    }
  }
}

// With theta = 1 / m the family is SAG. The numbers are below 2, and rounding errors fade with the decay.
void check_theta_of_sag() {
  for (const int64_t n : {3, 9}) {
    for (const bool weighted : {false, true}) {
      const Mode sag = {"SAG", false, weighted, 0}, family = {"theta 1 / m", false, weighted, 1};
      check_alike(kTypes[1], n, sag, family, 1e-14, [n](int64_t m, StepArgs* step) {
        double seen = 0;
        for (int64_t i = 0; i < n && i <= m; ++i) seen += step->batch_weights == nullptr ? 1 : step->batch_weights[i];
        step->theta = number(1 / seen);
      });
    }
  }
}

// By value, and by pointer. 0.375 is exact in float32.
void check_forms() {
  const double theta64 = 0.375;
  const float theta32 = 0.375f;
  const Scalar kThetas[] = {{&theta64, DType::kFloat64, NAN}, {&theta32, DType::kFloat32, NAN}};
  const Mode mode = {"by pointer", true, true, 0.375};
  for (const Types& types : kTypes) {
    for (const Scalar& theta : kThetas) {
      int64_t slot = 0;
      check_alike(types, 5, mode, mode, 0, [&](int64_t, StepArgs* step) {
        slot = step->batch_index.value;
        step->batch_index = {true, &slot, -1};
        step->theta = theta;
      });
    }
  }
}

// A theta that is not asked for is not looked at, and neither is an index.
void check_not_given() {
  const Mode mode = {"not given", false, false, 0};
  check_alike(kTypes[0], 3, mode, mode, 0, [](int64_t, StepArgs* step) {
    step->theta = number(7);
    step->batch_index = {false, nullptr, -1};
  });
}

}  // namespace
}  // namespace native_test

int main(int argc, char** argv) {
  using namespace native_test;
  choose_kernel(argc, argv);
  check_worked_examples();
  check_same_bits();
  check_theta_of_sag();
  check_forms();
  check_not_given();
  return 0;
}
