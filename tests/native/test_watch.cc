// SPDX-License-Identifier: Apache-2.0
// The watch (asgd_watch.h): which elements it samples, what it adds up, and that no step depends on it; and what an
// index out of range does. Must not check what a step computes. `test_watch cpu` tests the CPU's kernel, `test_watch
// cuda` the other.
#include <algorithm>
#include <vector>

#include "asgd_slots.h"
#include "asgd_watch.h"
#include "driver.h"

namespace native_test {
namespace {

using paddle_asgd::kWatchRun;
using paddle_asgd::kWatchWindow;
using paddle_asgd::watch_begin;
using paddle_asgd::WatchEntry;

void check_runs() {
  for (const int64_t numel : {1, 15, 16, 17, 4095, 4096, 4097, 4113, 12289}) {
    for (int64_t window = 0; window * kWatchWindow < numel; ++window) {
      const int64_t begin = window * kWatchWindow, end = std::min(begin + kWatchWindow, numel);
      const auto check_run = [&](int64_t m) {
        const int64_t run = watch_begin(window, m, numel);
        CHECK(begin <= run && run < end && run % kWatchRun == 0, "numel %ld, window %ld, m %ld: %ld", numel, window, m,
              run);
        // In memory it ends with the tensor, and otherwise within the window.
        CHECK(run + kWatchRun <= begin + kWatchWindow, "numel %ld, window %ld, m %ld: %ld", numel, window, m, run);
        return (run - begin) / kWatchRun;
      };
      for (const int64_t m : kDamaged) check_run(m);
      // Every run is reached: at every step, every eighth, and where a slot comes every n steps.
      for (const int64_t every : {1, 8, 3, 10, 64, 100, 257}) {
        std::vector<bool> reached((end - begin + kWatchRun - 1) / kWatchRun);
        for (int64_t k = 0; k < 4000; ++k) reached[check_run(window + k * every)] = true;
        CHECK(std::count(reached.begin(), reached.end(), false) == 0, "numel %ld, window %ld, every %ld steps", numel,
              window, every);
      }
    }
  }
  for (const int64_t windows : {0, 1, 31, 32}) CHECK(paddle_asgd::watch_stride(windows) == 1, "%ld", windows);
  for (const int64_t windows : {33, 34, 64}) CHECK(paddle_asgd::watch_stride(windows) == 2, "%ld", windows);
  CHECK(paddle_asgd::watch_stride(1000000) == 31250, "%ld", paddle_asgd::watch_stride(1000000));
}

void check_entries() {
  using namespace paddle_asgd;
  double watch[kWatchSize] = {3, 5, 7};
  for (int64_t step = 1; step <= 2; ++step) {
    close_step(watch, 3);
    CHECK(watch[kSteps] == step && watch[kReplaced] == 3 && watch[kPasses] == 0, "step %ld", step);
  }
  refuse_index(watch, -7);
  refuse_index(watch, 11);
  close_step(watch, 3);
  const double kExpected[kWatchSize] = {0, 0, 0, 0, 1, 2, 11, 3, 5, 7};
  for (int i = 0; i < kWatchSize; ++i) CHECK(watch[i] == kExpected[i], "entry %d: %g", i, watch[i]);
  // Eleven passes, of which the last nine are kept; the tenth and the eleventh are where the first two were.
  for (int pass = 2; pass <= 11; ++pass) {
    for (int i = 0; i < 3; ++i) watch[kReplaced + i] = 10 * pass + i;
    for (int step = 0; step < 3; ++step) close_step(watch, 3);
  }
  const double kKeptExpected[kWatchSize] = {0,  0,  0,  0,  11, 2,  11, 100, 101, 102, 110, 111, 112, 30, 31, 32, 40,
                                            41, 42, 50, 51, 52, 60, 61, 62,  70,  71,  72,  80,  81,  82, 90, 91, 92};
  for (int i = 0; i < kWatchSize; ++i) CHECK(watch[i] == kKeptExpected[i], "entry %d: %g", i, watch[i]);
}

// ---- Sums ----------------------------------------------------------------------------------------------------------

struct Sums {
  double replaced = 0, centred = 0, sampled = 0;
};

// What the last whole pass has left.
const double* last_pass(const double* watch) {
  const int64_t passes = static_cast<int64_t>(watch[paddle_asgd::kPasses]);
  return watch + paddle_asgd::kKept + (passes == 0 ? 0 : 3 * ((passes - 1) % paddle_asgd::kPassesKept));
}

template <typename T>
void add_run(const Tensor& t, const Visit& visit, double divisor, int64_t begin, Sums* sums) {
  const T share = static_cast<T>(1 / divisor);
  for (int64_t e = begin; e < std::min(begin + kWatchRun, t.numel); ++e) {
    const double g = t.grad.at(e), y_i = t.stored(visit.slot, e);
    const double mean = static_cast<T>(t.d.at(e)) * share;
    sums->replaced += (g - y_i) * (g - y_i);
    sums->centred += (g - mean) * (g - mean);
    sums->sampled += 1;
  }
}

// What a step must add, from what its tensors hold before it.
void add_sums(const Tensors& tensors, const Plan& plan, Sums* sums) {
  const auto windows_of = [](const Tensor& t) { return (t.numel + kWatchWindow - 1) / kWatchWindow; };
  int64_t windows = 0, before = 0;
  for (const auto& t : tensors) windows += windows_of(*t);
  const int64_t stride = paddle_asgd::watch_stride(windows);
  const int64_t first = paddle_asgd::slot_of_step(tensors[0]->m()[0], stride);
  for (const auto& t : tensors) {
    const Visit visit = plan.visit(t->m());
    const double divisor = paddle_asgd::weight_seen(visit, t->m(), plan.mode.indexed, plan.n, plan.batch_weights());
    for (int64_t window = 0; window < windows_of(*t); ++window) {
      if (!visit.seen_before || (before + window) % stride != first) continue;
      const int64_t begin = watch_begin(window, t->m()[0], t->numel);
      t->types.compute() == DType::kFloat64 ? add_run<double>(*t, visit, divisor, begin, sums)
                                            : add_run<float>(*t, visit, divisor, begin, sums);
    }
    before += windows_of(*t);
  }
}

// Takes steps with the watch and without. `sums`: whether a launch sees all tensors, so that its sample is known.
void check_steps(const Tensors& watched, const Tensors& unwatched, Plan* plan, int64_t steps, bool sums) {
  Sums pass, last;
  int64_t first_visits = 0;
  for (int64_t step = 0; step < steps; ++step) {
    for (size_t i = 0; i < watched.size(); ++i) {
      set_gradients(watched[i].get(), &plan->random);
      for (int64_t e = 0; e < watched[i]->numel; ++e) unwatched[i]->grad.put(e, watched[i]->grad.at(e));
    }
    const Sums before = pass;
    add_sums(watched, *plan, &pass);
    first_visits += pass.replaced == before.replaced;
    plan->watches = false;
    take_step(unwatched, *plan);
    plan->watches = true;
    take_step(watched, *plan);
    for (size_t i = 0; i < watched.size(); ++i) CHECK(watched[i]->bytes() == unwatched[i]->bytes(), "tensor %zu", i);
    const int64_t passes = (step + 1) / plan->n, left = (step + 1) % plan->n;
    if (left == 0) last = pass, pass = Sums{};
    const double* got = plan->watch_sums();
    const auto where = std::string(watched[0]->types.name) + ", " + plan->mode.name + ", step " + std::to_string(step);
    CHECK(got[paddle_asgd::kPasses] == passes && got[paddle_asgd::kSteps] == left, "%s", where.c_str());
    CHECK(got[paddle_asgd::kRefusals] == 0 && got[paddle_asgd::kRefusedIndex] == 0, "%s", where.c_str());
    const double expected[][2] = {{got[paddle_asgd::kReplaced], pass.replaced},
                                  {got[paddle_asgd::kCentred], pass.centred},
                                  {got[paddle_asgd::kSampled], pass.sampled},
                                  {last_pass(got)[0], last.replaced},
                                  {last_pass(got)[1], last.centred},
                                  {last_pass(got)[2], last.sampled}};
    for (const auto& row : expected) {
      CHECK(std::isfinite(row[0]) && (!sums || close(row[0], row[1])), "%s: %.17g, not %.17g", where.c_str(), row[0],
            row[1]);
    }
    plan->draw();
  }
  CHECK(first_visits >= plan->n && first_visits < steps, "%ld first visits", first_visits);
  CHECK(last_pass(plan->watch_sums())[0] > 0, "nothing was sampled");
}

void check_sums(const Types& types, const Mode& mode, int64_t n, const std::vector<int64_t>& sizes, int64_t steps) {
  Plan plan(mode, n, 11);
  Random one(12), other(12);
  check_steps(make(types, sizes, n, 1, &one, mode.indexed), make(types, sizes, n, 1, &other, mode.indexed), &plan,
              steps, true);
}

void check_every_sum() {
  const std::vector<int64_t> sizes = {0, 1, 17, 0, 4099, 65, 0};
  for (const Types& types : kTypes) {
    for (const Mode& mode : kModes) check_sums(types, mode, 3, sizes, 12);
  }
  // How a stored number is read depends on no mode.
  for (const Types& types : kNarrowTypes) {
    for (const Mode& mode : {kModes[0], kModes[10]}) check_sums(types, mode, 3, sizes, 12);
  }
  // 32 windows, each at every step; 36, every other in turn, with empty tensors between them.
  check_sums(kTypes[1], kModes[0], 2, {31 * kWatchWindow, 5}, 4);
  for (const Mode& mode : {kModes[0], kModes[10]}) {
    check_sums(kTypes[0], mode, 2, {5, 0, 33 * kWatchWindow + 5, 0, 100}, 18);
  }
}

// More tensors than a launch takes, of all types; the last fills a launch, or is empty.
void check_many_tensors() {
  for (const int64_t count : {560, 606}) {
    Random one(13), other(13);
    const Mode& mode = kModes[count == 560 ? 0 : 10];
    Tensors watched = make_many(count, 3, &one, mode.indexed), unwatched = make_many(count, 3, &other, mode.indexed);
    Plan plan(mode, 3, 14);
    check_steps(watched, unwatched, &plan, 7, !on_cuda);
  }
  // Few windows are all sampled, in one launch or in several. With 16, not the types of the last launch close the step.
  for (const int64_t count : {16, 20}) {
    const Mode& mode = kModes[count == 16 ? 10 : 0];
    Random one(15), other(15);
    Tensors watched = make_many(count, 3, &one, mode.indexed), unwatched = make_many(count, 3, &other, mode.indexed);
    Plan plan(mode, 3, 16);
    check_steps(watched, unwatched, &plan, 13, true);
  }
}

// Worked by hand: n = 2, four elements alike. d is 6 before the first replacement, 7 before the second.
void check_worked_example() {
  const Tensors tensors = make_one(kTypes[0], 4, 2);
  Plan plan(kModes[0], 2, 17);
  plan.watches = true;
  const struct {
    double g, replaced, centred, last_replaced, last_centred;
  } kRows[] = {{2, 0, 0, 0, 0}, {4, 0, 0, 0, 0}, {3, 4, 0, 0, 0}, {1, 0, 0, 40, 25}, {3, 0, 4, 40, 25}};
  for (const auto& row : kRows) {
    tensors[0]->grad.fill(row.g);
    take_step(tensors, plan);
    const double* got = plan.watch_sums();
    CHECK(got[paddle_asgd::kReplaced] == row.replaced && got[paddle_asgd::kCentred] == row.centred, "%g: %g %g", row.g,
          got[paddle_asgd::kReplaced], got[paddle_asgd::kCentred]);
    const double* last = last_pass(got);
    CHECK(last[0] == row.last_replaced && last[1] == row.last_centred, "%g: %g %g", row.g, last[0], last[1]);
    CHECK(last[2] == (row.last_centred > 0 ? 8 : 0) &&
              got[paddle_asgd::kSampled] == (row.replaced + row.centred > 0 ? 4 : 0),
          "%g: %g %g", row.g, last[2], got[paddle_asgd::kSampled]);
  }
}

// ---- Steps that are not taken --------------------------------------------------------------------------------------

// Nothing but the two entries, or not even these, may change.
void check_refusal(const Tensors& tensors, Plan* plan, int64_t index, bool inf) {
  const auto bytes = bytes_of(tensors);
  std::vector<double> expected(plan->watch_sums(), plan->watch_sums() + paddle_asgd::kWatchSize);
  if (plan->watches && !inf) {
    expected[paddle_asgd::kRefusals] += 1;
    expected[paddle_asgd::kRefusedIndex] = static_cast<double>(index);
  }
  const auto args = args_of(tensors);
  StepArgs step = plan->step(args);
  step.batch_index.value = index;
  if (inf) step.found_inf = &inf;
  run(step);
  for (size_t i = 0; i < tensors.size(); ++i) CHECK(tensors[i]->bytes() == bytes[i], "index %ld, tensor %zu", index, i);
  for (size_t i = 0; i < expected.size(); ++i) {
    CHECK(plan->watch.at(i) == expected[i], "index %ld, inf %d, entry %zu: %g", index, inf, i, plan->watch.at(i));
  }
}

void check_refusals() {
  for (const Mode& mode : kModes) {
    Plan plan(mode, 3, 18);
    if (!mode.indexed) continue;
    const Tensors tensors = make_many(603, 3, &plan.random, true);
    for (int step = 0; step < 4; ++step) {
      set_gradients(tensors, &plan.random);
      plan.watches = true;
      take_step(tensors, plan);
      plan.draw();
    }
    set_gradients(tensors, &plan.random);
    for (const bool watches : {false, true}) {
      plan.watches = watches;
      for (const int64_t index : {int64_t{-1}, int64_t{3}, INT64_MIN, INT64_MAX}) {
        check_refusal(tensors, &plan, index, false);
        check_refusal(tensors, &plan, index, true);
      }
      check_refusal(tensors, &plan, 2, true);
    }
  }
}

}  // namespace
}  // namespace native_test

int main(int argc, char** argv) {
  using namespace native_test;
  choose_kernel(argc, argv);
  check_runs();
  check_entries();
  check_worked_example();
  check_every_sum();
  check_many_tensors();
  check_refusals();
  return 0;
}
