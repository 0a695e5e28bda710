// A kernel driven with raw buffers: which memory it writes, and that each element gets what asgd_formula.h says. Must
// not write the formula again. `test_step cpu` tests the CPU's kernel, `test_step cuda` the other; `test_step cpu
// checksums` prints one line for each combination of types instead, to compare kernels and builds.
#include "asgd_formula.h"
#include "driver.h"

namespace native_test {
namespace {

using paddle_asgd::kRefreshPasses;
using paddle_asgd::Range;

// What one tensor held before a step.
struct Before {
  explicit Before(const Tensor& t) : m(t.m), d(t.d.bytes()), y(t.y.bytes()), weights(t.weights().bytes()) {}
  int64_t m;
  std::string d, y, weights;
};

template <typename T>
void check_step(const Tensor& t, const Before& before, int64_t n) {
  const int64_t slot = paddle_asgd::slot_of_step(before.m, n);
  const Range fresh = paddle_asgd::refresh_range(before.m, n, t.numel);
  const auto c = paddle_asgd::coefficients<T>(kRate, kDecay, before.m, n);
  const auto where = [&](int64_t e) {
    return std::string(t.types.name) + ", n " + std::to_string(n) + ", m " + std::to_string(before.m) + ", element " +
           std::to_string(e) + " of " + std::to_string(t.numel);
  };
  CHECK(t.m == before.m + 1, "%s", where(0).c_str());
  std::string history = before.y;
  const std::string gradient = t.grad.bytes();
  history.replace(slot * gradient.size(), gradient.size(), gradient);
  CHECK(t.y.bytes() == history, "%s", where(0).c_str());
  Buffer rounded(t.types.param, 1);
  for (int64_t e = 0; e < t.numel; ++e) {
    const T d = static_cast<T>(t.d.at(e));
    if (e >= fresh.begin && e < fresh.end) {
      CHECK(same(d, static_cast<T>(sum_of_history(t, n, e))), "%s: %a", where(e).c_str(), double(d));
    } else {
      const T y_i = static_cast<T>(Buffer::read(before.y.data(), t.types.grad, slot * t.numel + e));
      const T old = static_cast<T>(Buffer::read(before.d.data(), t.types.compute(), e));
      const T expected = paddle_asgd::replace_gradient<T>(old, y_i, static_cast<T>(t.grad.at(e)));
      CHECK(same(d, expected), "%s: %a, not %a", where(e).c_str(), double(d), double(expected));
    }
    const DType stored = t.types.master ? DType::kFloat32 : t.types.param;
    const T x = paddle_asgd::descend<T>(static_cast<T>(Buffer::read(before.weights.data(), stored, e)), d, c);
    rounded.put(0, x);
    CHECK(!t.types.master || same(t.master.at(e), x), "%s: %a, not %a", where(e).c_str(), t.master.at(e), double(x));
    CHECK(same(t.param.at(e), rounded.at(0)), "%s: %a, not %a", where(e).c_str(), t.param.at(e), rounded.at(0));
  }
}

void check_step(const Tensor& t, const Before& before, int64_t n) {
  t.types.compute() == DType::kFloat64 ? check_step<double>(t, before, n) : check_step<float>(t, before, n);
}

void check_every_step() {
  Random random(1);
  for (const Types& types : kTypes) {
    for (const int64_t n : {1, 2, 3, 7}) {
      // Offsets 0 and 1: 16-byte accesses are possible, or are not. Empty tensors first, in the middle and last.
      const Tensors tensors = make(types, {0, 1, 63, 0, 65, 257, 8193, 64, 0}, n, n % 2, &random);
      for (int64_t step = 0; step < 2 * kRefreshPasses * n + 3; ++step) {
        std::vector<Before> before;
        for (const auto& t : tensors) set_gradients(t.get(), &random), before.emplace_back(*t);
        take_step(tensors, n);
        for (size_t i = 0; i < tensors.size(); ++i) check_step(*tensors[i], before[i], n);
      }
    }
  }
}

// More tensors than one launch takes, of all types in turn, none of them of its neighbour's size.
void check_many_tensors() {
  Random random(2);
  Tensors tensors;
  for (int i = 0; i < 1203; ++i) {
    tensors.emplace_back(new Tensor(kTypes[i % 10], i % 7 == 3 ? 0 : i % 11, 3, i % 3));
    set_gradients(tensors.back().get(), &random);
  }
  for (int step = 0; step < 4; ++step) {
    std::vector<Before> before;
    for (const auto& t : tensors) before.emplace_back(*t);
    take_step(tensors, 3);
    for (size_t i = 0; i < tensors.size(); ++i) check_step(*tensors[i], before[i], 3);
  }
}

void print_checksums() {
  for (const Types& types : kTypes) {
    Random random(9);
    uint64_t hash = 14695981039346656037u;  // FNV-1a
    for (const int64_t n : {3, 7}) {
      const Tensors tensors = make(types, {0, 1, 63, 64, 65, 257, 8193}, n, 0, &random);
      for (int step = 0; step < kRefreshPasses * n + 5; ++step) {
        for (const auto& t : tensors) set_gradients(t.get(), &random);
        take_step(tensors, n);
      }
      for (const auto& t : tensors) {
        for (const char byte : t->bytes()) hash = (hash ^ static_cast<uint8_t>(byte)) * 1099511628211u;
      }
    }
    std::printf("%s: %016lx\n", types.name, hash);
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
  check_many_tensors();
  return 0;
}
