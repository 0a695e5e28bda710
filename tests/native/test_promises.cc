// SPDX-License-Identifier: Apache-2.0
// What a step promises whatever its formula looks like: roundings, exact cases, found_inf, damaged counters, sparse
// gradients. Must not compute an expected value by asgd_formula.h. `test_promises cpu` tests the CPU's kernel,
// `test_promises cuda` the other.
#include <algorithm>

#include "asgd_refresh.h"
#include "asgd_slots.h"
#include "driver.h"

namespace native_test {
namespace {

using paddle_asgd::GradientRow;
using paddle_asgd::GradientRows;
using paddle_asgd::kRefreshPasses;

// Each product is rounded before it is added, and both are added before x is reached: else a row's x would differ.
void check_rounding() {
  const double one = 1 + 0x1p-12, square = 1 + 0x1p-11;  // square: one * one in float32
  const double third = 0.375 * 0x1p-24;                  // of what 1 in float32 can lose; two of them are too much
  const struct {
    double x, rate, decay, g, expected;
  } kRows[] = {{square, one, 0, one, 0},
               {one / 64, 1, one * 64, -square, one / 64},
               {-square / 64, one, 64 / one, one, -square / 64},
               {1, 1, third, third, 1 - 0x1p-24}};
  for (const auto& row : kRows) {
    const Tensors tensors = make_one(kTypes[0], 33, 3);
    tensors[0]->set_weights(row.x), tensors[0]->grad.fill(row.g);
    const auto args = args_of(tensors);
    StepArgs step = step_args(args, 3);
    step.learning_rate = number(row.rate);
    step.weight_decay = number(row.decay);
    run(step);
    for (int64_t e = 0; e < 33; ++e) CHECK(tensors[0]->param.at(e) == row.expected, "%a", tensors[0]->param.at(e));
  }
}

// With one batch d is its gradient, exactly: gradient descent, without one rounding error more.
void check_one_batch() {
  Random random(3);
  for (const Types& types : kTypes) {
    const Tensors tensors = make(types, {257}, 1, 0, &random);
    for (int step = 0; step < 3 * kRefreshPasses; ++step) {
      set_gradients(tensors[0].get(), &random);
      take_step(tensors, 1);
      for (int64_t e = 0; e < 257; ++e) CHECK(tensors[0]->d.at(e) == tensors[0]->grad.at(e), "%s %ld", types.name, e);
    }
  }
}

// Where sums are exact a refresh changes nothing, so one tensor and its elements one by one give the same bits.
void check_split() {
  Random random(4);
  for (const Types& types : kTypes) {
    const int64_t n = 3, numel = 70;
    const Tensors whole = make_one(types, numel, n);
    Tensors parts;
    for (int64_t e = 0; e < numel; ++e) {
      parts.emplace_back(new Tensor(types, 1, n, e % 4));
      whole[0]->set_weight(e, random.number());
      parts[e]->set_weight(0, whole[0]->param.at(e));
      if (types.master) whole[0]->set_weight(e, whole[0]->param.at(e));
    }
    for (int step = 0; step < 2 * kRefreshPasses * n + 3; ++step) {
      for (int64_t e = 0; e < numel; ++e) {
        whole[0]->grad.put(e, random.quarter());
        parts[e]->grad.put(0, whole[0]->grad.at(e));
      }
      take_step(whole, n);
      take_step(parts, n);
      for (int64_t e = 0; e < numel; ++e) {
        CHECK(whole[0]->d.at(e) == parts[e]->d.at(0), "%s %ld", types.name, e);
        CHECK(whole[0]->weights().at(e) == parts[e]->weights().at(0), "%s %ld", types.name, e);
      }
    }
  }
}

// A NaN, an Inf and a number that swallows all others: gone once their slot is overwritten and a window has passed.
void check_spikes_age_out() {
  const int64_t n = 7, numel = 257;
  for (const Types& types : kTypes) {
    Random random(5);
    const Tensors tensors = make(types, {numel}, n, 0, &random);
    Tensor& t = *tensors[0];
    for (int step = 0; step < (2 + kRefreshPasses) * n; ++step) {
      for (int64_t e = 0; e < numel; ++e) t.grad.put(e, random.quarter());
      const double kSpikes[] = {NAN, INFINITY, 30000};
      if (step == 4) {
        for (int64_t e = 0; e < numel; ++e) t.grad.put(e, kSpikes[e % 3] + random.number());
      }
      take_step(tensors, n);
      if (step == 5) CHECK(std::isnan(t.d.at(0)) && !std::isfinite(t.d.at(1)), "%s", types.name);
    }
    for (int64_t e = 0; e < numel; ++e)
      CHECK(t.d.at(e) == sum_of_history(t, n, e), "%s %ld: %a", types.name, e, t.d.at(e));
  }
}

void check_found_inf() {
  Random random(6);
  for (const Types& types : kTypes) {
    const Tensors tensors = make(types, {0, 257, 65}, 3, 1, &random);
    set_gradients(tensors, &random);
    take_step(tensors, 3);
    const auto bytes = bytes_of(tensors);
    const auto args = args_of(tensors);
    StepArgs step = step_args(args, 3);
    bool found_inf = true;
    step.found_inf = &found_inf;
    run(step);
    for (size_t i = 0; i < tensors.size(); ++i) CHECK(tensors[i]->bytes() == bytes[i], "%s %zu", types.name, i);
    found_inf = false;
    run(step);
    for (size_t i = 0; i < tensors.size(); ++i) CHECK(tensors[i]->bytes() != bytes[i], "%s %zu", types.name, i);
  }
}

// By value, and by pointer to float64 or float32. 0.375 and 0.625 are exact in all.
void check_scalars() {
  const double rate64 = 0.375, decay64 = 0.625;
  const float rate32 = 0.375f, decay32 = 0.625f;
  const Scalar kForms[][2] = {{number(rate64), number(decay64)},
                              {{&rate64, DType::kFloat64, NAN}, {&decay64, DType::kFloat64, NAN}},
                              {{&rate32, DType::kFloat32, NAN}, {&decay32, DType::kFloat32, NAN}},
                              {{&rate32, DType::kFloat32, NAN}, number(decay64)}};
  for (const Types& types : kTypes) {
    std::string first;
    for (const auto& form : kForms) {
      Random random(7);
      const Tensors tensors = make(types, {257}, 3, 0, &random);
      const auto args = args_of(tensors);
      StepArgs step = step_args(args, 3);
      step.learning_rate = form[0];
      step.weight_decay = form[1];
      for (int i = 0; i < 5; ++i) set_gradients(tensors[0].get(), &random), run(step);
      if (first.empty()) first = tensors[0]->bytes();
      CHECK(tensors[0]->bytes() == first, "%s, form %td", types.name, &form - kForms);
      CHECK(std::isfinite(tensors[0]->param.at(256)), "%s", types.name);
    }
  }
}

// A counter may come from a damaged checkpoint.
void check_damaged_counters() {
  Random random(8);
  for (const int64_t m : kDamaged) {
    const Tensors tensors = make(kTypes[0], {257}, 7, 0, &random);
    Tensor& t = *tensors[0];
    set_gradients(&t, &random);
    t.m()[0] = m;
    take_step(tensors, 7);
    const int64_t slot = paddle_asgd::slot_of_step(m, 7);
    CHECK(slot >= 0 && slot < 7 && t.y.at(slot * 257 + 5) == t.grad.at(5), "m %ld: slot %ld", m, slot);
    CHECK(t.m()[0] == static_cast<int64_t>(static_cast<uint64_t>(m) + 1), "m %ld: then %ld", m, t.m()[0]);
    for (int64_t e = 0; e < 257; ++e) CHECK(std::isfinite(t.param.at(e)), "m %ld", m);
  }
}

void check_endless_history() {
  for (const int64_t n : kEndless) {
    const Tensors tensors = make_one(kTypes[0], 0, 1);
    take_step(tensors, n);
    CHECK(tensors[0]->m()[0] == 1, "n %ld", n);
  }
}

// A parameter whose gradient comes as rows takes, to the bit, the step of the dense gradient that they add up to. Next
// to it lies one with a dense gradient.
void check_gradient_rows_of(const Types& types, const Mode& mode, int64_t n, int64_t height, int64_t width) {
  Plan plans[] = {{mode, n, 2}, {mode, n, 2}};
  Random random(5);
  Tensors tensors[2];
  for (int k = 0; k < 2; ++k) {
    Random same(4);
    tensors[k] = make(types, {65, height * width}, n, k, &same, mode.indexed);
    plans[k].watches = true;
  }
  for (int64_t m = 0; m < 9 * n + 2; ++m) {
    const int64_t count = m % 4 * 2;
    std::vector<GradientRow> entries;
    for (int64_t k = 0; k < count; ++k) entries.push_back({static_cast<int64_t>(random.next() % height), k});
    Buffer values(types.grad, count * width, 1);
    Buffer& dense = tensors[0][1]->grad;
    dense.fill(0);
    for (const GradientRow& entry : entries) {
      for (int64_t j = 0; j < width; ++j) {
        const double value = random.quarter();
        values.put(entry.position * width + j, value);
        dense.put(entry.row * width + j, dense.at(entry.row * width + j) + value);
      }
    }
    std::stable_sort(entries.begin(), entries.end(),
                     [](const GradientRow& a, const GradientRow& b) { return a.row < b.row; });
    const GradientRows rows[] = {{}, {entries.data(), entries.data() + entries.size(), width}};
    for (int k = 0; k < 2; ++k) {
      Random same(100 + m);
      set_gradients(tensors[k][0].get(), &same);
      auto args = args_of(tensors[k]);
      if (k == 1) args[1].grad = values.data();
      StepArgs step = plans[k].step(args);
      step.gradient_rows = k == 1 ? rows : nullptr;
      run(step);
      plans[k].draw();
    }
    for (int i = 0; i < 2; ++i) {
      CHECK(tensors[0][i]->bytes() == tensors[1][i]->bytes(), "%s, %s, n %ld, step %ld, width %ld, parameter %d",
            types.name, mode.name, n, m, width, i);
    }
  }
  CHECK(plans[0].watch.bytes() == plans[1].watch.bytes(), "%s, %s, n %ld, width %ld", types.name, mode.name, n, width);
}

void check_gradient_rows() {
  if (on_cuda) return;  // which is given dense gradients only
  for (const Types& types : kTypes) {
    for (const Mode& mode : {kModes[0], kModes[4], kModes[11]}) {
      for (const int64_t n : {1, 3}) {
        check_gradient_rows_of(types, mode, n, 1500, 1);
        check_gradient_rows_of(types, mode, n, 40, 77);
        check_gradient_rows_of(types, mode, n, 2, 1300);
      }
    }
  }
}

}  // namespace
}  // namespace native_test

int main(int argc, char** argv) {
  using namespace native_test;
  choose_kernel(argc, argv);
  check_rounding();
  check_one_batch();
  check_split();
  check_spikes_age_out();
  check_found_inf();
  check_scalars();
  check_damaged_counters();
  check_endless_history();
  check_gradient_rows();
  return 0;
}
