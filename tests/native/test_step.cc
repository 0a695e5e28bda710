// SPDX-License-Identifier: Apache-2.0
// A kernel driven with raw buffers: which memory it writes, and that each element gets what asgd_formula.h says. Must
// not write the formula again. `test_step cpu` tests the CPU's kernel, `test_step cuda` the other; `test_step cpu
// checksums` prints one line for each combination of types and mode instead, to compare kernels and builds.
#include <algorithm>

#include "asgd_formula.h"
#include "asgd_refresh.h"
#include "asgd_slots.h"
#include "block_scale.h"
#include "driver.h"

namespace native_test {
namespace {

using paddle_asgd::Coefficients;
using paddle_asgd::kRefreshPasses;
using paddle_asgd::kRefreshSpan;
using paddle_asgd::kScaleBlock;
using paddle_asgd::Range;
using paddle_asgd::Refresh;

// What one tensor held before a step.
struct Before {
  explicit Before(const Tensor& t)
      : clock(t.m(), t.m() + t.clock.bytes().size() / sizeof(int64_t)),
        d(t.d.bytes()),
        y(t.y.bytes()),
        y_scale(t.y_scale.bytes()),
        weights(t.weights().bytes()) {}
  std::vector<int64_t> clock;
  std::string d, y, y_scale, weights;
};

std::string place(const Tensor& t, const Plan& plan, int64_t m, int64_t e) {
  return std::string(t.types.name) + ", " + plan.mode.name + ", n " + std::to_string(plan.n) + ", m " +
         std::to_string(m) + ", element " + std::to_string(e) + " of " + std::to_string(t.numel);
}

template <typename Q>
void put_narrow(const Tensor& t, int64_t slot, std::string* history, std::string* scales) {
  const int64_t blocks = paddle_asgd::scale_blocks(t.numel);
  const auto scaled = [&](int64_t e) { return paddle_asgd::to_scaled(t.grad.at(e)); };
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * kScaleBlock, end = std::min(begin + kScaleBlock, t.numel);
    uint32_t largest = 0;
    for (int64_t e = begin; e < end; ++e) largest = std::max(largest, paddle_asgd::magnitude_bits(scaled(e)));
    const paddle_asgd::BlockScale found = paddle_asgd::block_scale<Q>(largest);
    std::memcpy(&(*scales)[(slot * blocks + block) * sizeof(float)], &found.scale, sizeof(float));
    for (int64_t e = begin; e < end; ++e) {
      const Q q = paddle_asgd::to_stored<Q>(scaled(e), found.inverse);
      std::memcpy(&(*history)[(slot * t.numel + e) * sizeof(Q)], &q, sizeof(Q));
    }
  }
}

// Puts the gradient into a slot of a history's bytes.
void put_gradient(const Tensor& t, int64_t slot, std::string* history, std::string* scales) {
  if (t.types.history == History::kInt16) return put_narrow<int16_t>(t, slot, history, scales);
  if (t.types.history == History::kInt8) return put_narrow<int8_t>(t, slot, history, scales);
  const std::string gradient = t.grad.bytes();
  history->replace(slot * gradient.size(), gradient.size(), gradient);
}

void check_state(const Tensor& t, const Before& before, const Plan& plan, const Visit& visit) {
  const auto where = [&]() { return place(t, plan, before.clock[0], 0); };
  std::vector<int64_t> clock = before.clock;
  paddle_asgd::advance(clock.data(), visit, plan.mode.indexed);
  for (size_t i = 0; i < clock.size(); ++i) {
    CHECK(t.m()[i] == clock[i], "%s: clock %zu: %ld, not %ld", where().c_str(), i, t.m()[i], clock[i]);
  }
  std::string history = before.y, scales = before.y_scale;
  put_gradient(t, visit.slot, &history, &scales);
  CHECK(t.y.bytes() == history && t.y_scale.bytes() == scales, "%s", where().c_str());
}

template <typename T>
void check_elements(const Tensor& t, const Before& before, const Plan& plan, const Visit& visit) {
  const int64_t n = plan.n;
  const double* weights = plan.batch_weights();
  const Refresh refresh = paddle_asgd::refresh_of(before.clock[0], n, t.numel);
  const double divisor = paddle_asgd::weight_seen(visit, before.clock.data(), plan.mode.indexed, n, weights);
  const Coefficients<T> c = paddle_asgd::coefficients<T>(kRate, kDecay, plan.mode.theta,
                                                         weights == nullptr ? 1 : weights[visit.slot], divisor);
  const auto where = [&](int64_t e) { return place(t, plan, before.clock[0], e); };
  const DType weight = t.types.master ? DType::kFloat32 : t.types.param;
  Buffer rounded(t.types.param, 1);
  for (int64_t e = 0; e < t.numel; ++e) {
    const T d = static_cast<T>(t.d.at(e)), g = static_cast<T>(t.grad.at(e));
    const T y_i = static_cast<T>(t.stored(before.y.data(), before.y_scale.data(), visit.slot, e));
    const T stored = static_cast<T>(t.stored(visit.slot, e));
    const T d_old = static_cast<T>(Buffer::read(before.d.data(), t.types.compute(), e));
    const Range fresh = paddle_asgd::refreshed_in(refresh, e / kRefreshSpan, t.numel);
    const bool refreshed = e >= fresh.begin && e < fresh.end;
    const T expected = refreshed ? static_cast<T>(sum_of_history(t, n, e, weights))
                                 : paddle_asgd::replace_gradient<T>(d_old, y_i, stored, c.weight);
    CHECK(same(d, expected), "%s: %a, not %a", where(e).c_str(), double(d), double(expected));
    const T x_old = static_cast<T>(Buffer::read(before.weights.data(), weight, e));
    const T x = plan.mode.theta == 0 ? paddle_asgd::descend<T>(x_old, d, c)
                                     : paddle_asgd::descend_theta<T>(x_old, d_old, y_i, g, c);
    rounded.put(0, x);
    CHECK(!t.types.master || same(t.master.at(e), x), "%s: %a, not %a", where(e).c_str(), t.master.at(e), double(x));
    CHECK(same(t.param.at(e), rounded.at(0)), "%s: %a, not %a", where(e).c_str(), t.param.at(e), rounded.at(0));
  }
}

void check_step(const Tensor& t, const Before& before, const Plan& plan) {
  const Visit visit = plan.visit(before.clock.data());
  check_state(t, before, plan, visit);
  t.types.compute() == DType::kFloat64 ? check_elements<double>(t, before, plan, visit)
                                       : check_elements<float>(t, before, plan, visit);
}

void check_steps(const Tensors& tensors, Plan* plan, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step) {
    set_gradients(tensors, &plan->random);
    std::vector<Before> before;
    for (const auto& t : tensors) before.emplace_back(*t);
    take_step(tensors, *plan);
    for (size_t i = 0; i < tensors.size(); ++i) check_step(*tensors[i], before[i], *plan);
    plan->draw();
  }
}

void check_steps(const Types& types, const Mode& mode, int64_t n, const std::vector<int64_t>& sizes, int64_t steps) {
  Plan plan(mode, n, 1);
  // Offsets 0 and 1: 16-byte accesses are possible, or are not.
  const Tensors tensors = make(types, sizes, n, n % 2, &plan.random, mode.indexed);
  check_steps(tensors, &plan, steps);
}

void check_every_step() {
  for (const Types& types : kTypes) {
    for (const int64_t n : {1, 2, 3, 7}) {
      // Empty tensors first, in the middle and last.
      check_steps(types, kModes[0], n, {0, 1, 63, 0, 65, 257, 8193, 64, 0}, 2 * kRefreshPasses * n + 3);
      // Two refresh units, one of them short.
      for (const Mode& mode : kModes) check_steps(types, mode, n, {0, 65, 1095, 0}, kRefreshPasses * n + 3);
    }
  }
  // More slots than a word of the clock has bits, and than the CPU's kernel adds at once.
  for (const Types& types : {kTypes[1], kTypes[7]}) {
    for (const Mode& mode : kModes) check_steps(types, mode, 65, {0, 17}, kRefreshPasses * 65 + 3);
  }
}

// Blocks of scales that are whole, short, and of one element; a refresh unit and the next; more than a chunk of the
// GPU.
void check_narrow_histories() {
  for (const Types& types : kNarrowTypes) {
    // The sum of the history adds the slots by eights, and what is left one by one.
    check_steps(types, kModes[0], 9, {0, 1, 127, 128, 129, 0, 4096 + 129, 0}, kRefreshPasses * 9 + 3);
    for (const Mode& mode : kModes) check_steps(types, mode, 3, {129, 1095}, kRefreshPasses * 3 + 3);
  }
}

void check_many_tensors() {
  for (const Mode& mode : {kModes[0], kModes[10]}) {
    Plan plan(mode, 3, 2);
    const Tensors tensors = make_many(2603, 3, &plan.random, mode.indexed);
    check_steps(tensors, &plan, 7);
  }
}

uint64_t add_steps(uint64_t hash, const Types& types, const Mode& mode, int64_t n) {
  Plan plan(mode, n, 9);
  const Tensors tensors = make(types, {0, 1, 63, 64, 65, 1291}, n, 0, &plan.random, mode.indexed);
  for (int64_t step = 0; step < kRefreshPasses * n + 5; ++step) {
    set_gradients(tensors, &plan.random);
    take_step(tensors, plan);
    plan.draw();
  }
  for (const auto& t : tensors) {
    for (const char byte : t->bytes()) hash = (hash ^ static_cast<uint8_t>(byte)) * 1099511628211u;
  }
  return hash;
}

void print_checksums() {
  for (const Types& types : every_types()) {
    for (const Mode& mode : kModes) {
      uint64_t hash = 14695981039346656037u;  // FNV-1a
      // The CPU's kernel adds the history by eights: no such, and one with three left over.
      for (const int64_t n : {3, 11}) hash = add_steps(hash, types, mode, n);
      std::printf("%s, %s: %016lx\n", types.name, mode.name, hash);
    }
  }
}

}  // namespace
}  // namespace native_test

int main(int argc, char** argv) {
  using namespace native_test;
  choose_kernel(argc, argv);
  if (argc > 2) {
    print_checksums();
    return 0;
  }
  check_every_step();
  check_narrow_histories();
  check_many_tensors();
  return 0;
}
