// SPDX-License-Identifier: Apache-2.0
// asgd_slots.h on its own: which slot a step visits, which slots it takes for seen, and what they weigh together. Must
// not run a kernel.
#include <algorithm>
#include <initializer_list>
#include <vector>

#include "asgd_slots.h"
#include "tensors.h"

namespace native_test {
namespace {

using paddle_asgd::Visit;

constexpr int64_t kManyN[] = {1, 2, 3, 7, 63, 64, 65, 100, 1000003, int64_t{1} << 31, INT64_MAX};

// No longer than it has to be, so that a sanitizer sees what lies behind.
std::vector<int64_t> fresh_clock(int64_t n) { return std::vector<int64_t>(paddle_asgd::clock_length(n)); }

void check_clock_length() {
  const int64_t kRows[][2] = {{1, 3},
                              {2, 3},
                              {63, 3},
                              {64, 3},
                              {65, 4},
                              {128, 4},
                              {129, 5},
                              {1000003, 2 + 15626},
                              {127, 4},
                              {130, 5},
                              {INT64_MAX - 63, 1 + (int64_t{1} << 57)}};
  for (const auto& row : kRows) {
    CHECK(paddle_asgd::clock_length(row[0]) == row[1], "n %ld: %ld", row[0], paddle_asgd::clock_length(row[0]));
  }
  CHECK(paddle_asgd::clock_length(INT64_MAX) == 2 + (int64_t{1} << 57), "must not overflow");
}

void check_in_range() {
  for (const int64_t n : kManyN) {
    CHECK(paddle_asgd::in_range(0, n) && paddle_asgd::in_range(n - 1, n), "n %ld", n);
    for (const int64_t slot : {int64_t{-1}, n, INT64_MIN, INT64_MAX}) {
      CHECK(!paddle_asgd::in_range(slot, n), "n %ld: %ld", n, slot);
    }
  }
}

void check_cyclic() {
  for (const int64_t n : kManyN) {
    for (int64_t m = 0; m < 300; ++m) {
      const Visit visit = paddle_asgd::cyclic_visit(m, n);
      CHECK(visit.slot == m % n && visit.seen_before == (m >= n) && visit.seen == std::min(m + 1, n), "m %ld n %ld", m,
            n);
    }
    for (const int64_t m : kDamaged) {
      const Visit visit = paddle_asgd::cyclic_visit(m, n);
      CHECK(0 <= visit.slot && visit.slot < n && visit.slot == paddle_asgd::slot_of_step(m, n), "m %ld n %ld: %ld", m,
            n, visit.slot);
      const bool sound = m >= 0 && m < n;  // with n as large as that
      CHECK(visit.seen == (sound ? m + 1 : n) && visit.seen_before == !sound, "m %ld n %ld", m, n);
    }
  }
}

// What a clock knows, kept another way.
class Model {
 public:
  explicit Model(int64_t n) : clock(fresh_clock(n)), n_(n), seen_(n) {}
  void visit(int64_t slot) {
    const Visit visit = paddle_asgd::indexed_visit(clock.data(), slot, n_);
    const bool before = seen_[slot];
    seen_[slot] = true, distinct_ += !before, ++steps_;
    CHECK(visit.slot == slot && visit.seen_before == before && visit.seen == distinct_, "n %ld slot %ld: seen %ld", n_,
          slot, visit.seen);
    paddle_asgd::advance(clock.data(), visit, true);
    CHECK(clock[0] == steps_ && clock[1] == distinct_, "n %ld slot %ld: %ld %ld", n_, slot, clock[0], clock[1]);
  }
  void check_bits() const {
    for (int64_t i = 0; i < n_; ++i) {
      CHECK(paddle_asgd::has_seen(clock.data(), i) == seen_[i], "n %ld slot %ld", n_, i);
    }
  }
  std::vector<int64_t> clock;

 private:
  int64_t n_;
  std::vector<bool> seen_;
  int64_t distinct_ = 0, steps_ = 0;
};

void check_indexed() {
  Random random(1);
  for (const int64_t n : {1, 2, 3, 63, 64, 65, 100, 1000003}) {
    Model model(n);
    for (int64_t step = 0; step < 300; ++step) {
      model.visit(static_cast<int64_t>(random.next() % n));
      if (n <= 100) model.check_bits();
    }
    model.check_bits();
    for (int64_t slot = n; slot-- > 0;) model.visit(slot);
    model.check_bits();
    CHECK(model.clock[1] == n, "n %ld: %ld", n, model.clock[1]);
  }
}

// One bit a slot, as the table in asgd_slots.h says: state written by one version is read by the next.
void check_layout() {
  std::vector<int64_t> clock = fresh_clock(130);
  for (const int64_t slot : {129, 0, 63, 64, 127, 63}) {
    paddle_asgd::advance(clock.data(), paddle_asgd::indexed_visit(clock.data(), slot, 130), true);
  }
  const int64_t border = INT64_MIN + 1;  // the first bit and the last
  CHECK((clock == std::vector<int64_t>{6, 5, border, border, 2}), "%lx %lx %lx", clock[2], clock[3], clock[4]);
  int64_t cyclic = 4;
  paddle_asgd::advance(&cyclic, paddle_asgd::cyclic_visit(cyclic, 3), false);
  CHECK(cyclic == 5, "%ld", cyclic);
}

// Whatever a checkpoint says, the count lies in 1 to n, the divisor is not 0, and no arithmetic overflows.
void check_damaged() {
  const int64_t n = 65;
  const std::vector<double> weights(n, 1);
  std::vector<int64_t> counts(std::begin(kDamaged), std::end(kDamaged));
  counts.insert(counts.end(), {0, n, n + 1});
  for (const int64_t count : counts) {
    CHECK(paddle_asgd::sound_count(count, n) == n, "%ld", count);
    for (const int64_t slot : {0, 1, 64}) {
      for (const bool marked : {false, true}) {
        std::vector<int64_t> clock = fresh_clock(n);
        clock[0] = clock[1] = count;
        if (marked) clock[2] = -1, clock[3] = 1;
        const Visit visit = paddle_asgd::indexed_visit(clock.data(), slot, n);
        CHECK(visit.seen_before == marked, "count %ld", count);
        CHECK(visit.seen == (count == 0 && !marked ? 1 : n), "count %ld: %ld", count, visit.seen);
        for (const double* w : {static_cast<const double*>(nullptr), weights.data()}) {
          CHECK(paddle_asgd::weight_seen(visit, clock.data(), true, n, w) == visit.seen, "count %ld", count);
          CHECK(paddle_asgd::weight_known(clock.data(), true, n, w) == (count == 0 ? 0 : n), "count %ld", count);
          CHECK(paddle_asgd::weight_known(clock.data(), false, n, w) == (count == 0 ? 0 : n), "count %ld", count);
        }
        paddle_asgd::advance(clock.data(), visit, true);
        CHECK(clock[0] == static_cast<int64_t>(static_cast<uint64_t>(count) + 1), "count %ld", count);
      }
    }
  }
  CHECK(paddle_asgd::sound_count(1, n) == 1 && paddle_asgd::sound_count(64, n) == 64, "sound");
}

// Divisors worked by hand; `weights` null: the slots are counted.
void check_weights(bool indexed, const double* weights, std::initializer_list<int64_t> slots,
                   std::initializer_list<double> expected) {
  std::vector<int64_t> clock = indexed ? fresh_clock(5) : std::vector<int64_t>(1);
  CHECK(paddle_asgd::weight_known(clock.data(), indexed, 5, weights) == 0, "before the first step");
  for (size_t i = 0; i < slots.size(); ++i) {
    const int64_t slot = slots.begin()[i];
    const Visit visit =
        indexed ? paddle_asgd::indexed_visit(clock.data(), slot, 5) : paddle_asgd::cyclic_visit(clock[0], 5);
    CHECK(visit.slot == slot, "step %zu: slot %ld", i, visit.slot);
    const double divisor = paddle_asgd::weight_seen(visit, clock.data(), indexed, 5, weights);
    CHECK(divisor == expected.begin()[i], "step %zu: %g", i, divisor);
    paddle_asgd::advance(clock.data(), visit, indexed);
    CHECK(paddle_asgd::weight_seen(visit, clock.data(), indexed, 5, weights) == divisor, "step %zu: marked", i);
    CHECK(paddle_asgd::weight_known(clock.data(), indexed, 5, weights) == divisor, "step %zu: known", i);
  }
}

void check_divisors() {
  const double weights[] = {0.25, 0.5, 1, 1.25, 2};
  check_weights(false, nullptr, {0, 1, 2, 3, 4, 0, 1}, {1, 2, 3, 4, 5, 5, 5});
  check_weights(false, weights, {0, 1, 2, 3, 4, 0, 1}, {0.25, 0.75, 1.75, 3, 5, 5, 5});
  check_weights(true, nullptr, {3, 1, 3, 4, 0, 0, 2, 3}, {1, 2, 2, 3, 4, 4, 5, 5});
  check_weights(true, weights, {3, 1, 3, 4, 0, 0, 2, 3}, {1.25, 1.75, 1.75, 3.75, 4, 4, 5, 5});
}

// The same slots in any order give the same bits, across the words of the clock; all of them weigh n exactly.
void check_order_does_not_matter() {
  const int64_t n = 130;
  Random random(2);
  std::vector<double> weights;
  for (int64_t i = 0; i < n; ++i) weights.push_back(1 + random.number());
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < n; i += 1 + i % 3) slots.push_back(i);
  double expected = 0;
  for (const int64_t slot : slots) expected += weights[slot];
  for (int trial = 0; trial < 20; ++trial) {
    for (size_t i = slots.size() - 1; i > 0; --i) std::swap(slots[i], slots[random.next() % (i + 1)]);
    std::vector<int64_t> clock = fresh_clock(n);
    double divisor = 0;
    for (const int64_t slot : slots) {
      const Visit visit = paddle_asgd::indexed_visit(clock.data(), slot, n);
      divisor = paddle_asgd::weight_seen(visit, clock.data(), true, n, weights.data());
      paddle_asgd::advance(clock.data(), visit, true);
    }
    CHECK(divisor == expected, "%a, not %a", divisor, expected);
    for (int64_t slot = 0; slot < n; ++slot) {
      paddle_asgd::advance(clock.data(), paddle_asgd::indexed_visit(clock.data(), slot, n), true);
    }
    CHECK(paddle_asgd::weight_known(clock.data(), true, n, weights.data()) == n, "all");
  }
}

}  // namespace
}  // namespace native_test

int main() {
  using namespace native_test;
  check_clock_length();
  check_in_range();
  check_cyclic();
  check_indexed();
  check_layout();
  check_damaged();
  check_divisors();
  check_order_does_not_matter();
  return 0;
}
