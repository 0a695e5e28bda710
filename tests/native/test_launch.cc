// SPDX-License-Identifier: Apache-2.0
// cuda_launch.h on its own, with the arguments of no optimizer: which tensors a launch holds, how long its arguments
// are, and which tensor a block finds. Must not run a kernel.
#include <vector>

#include "check.h"
#include "cuda_launch.h"

namespace {

using paddle_asgd::kChunk;
using paddle_asgd::kLongArguments;
using paddle_asgd::kOtherArguments;
using paddle_asgd::kShortArguments;

struct SomeTensor {
  int64_t numel;
  int64_t position;
};
struct SomeStep {
  int64_t count;
  double rate;
};
using Short = paddle_asgd::Launch<SomeTensor, SomeStep, kShortArguments>;
using Long = paddle_asgd::Launch<SomeTensor, SomeStep, kLongArguments>;

// The arguments are used up: not one tensor more would fit.
template <typename Launch>
void check_capacity(int bytes) {
  const int used = static_cast<int>(sizeof(Launch)), one_more = static_cast<int>(sizeof(SomeTensor) + sizeof(int32_t));
  CHECK(used <= bytes - kOtherArguments, "%d of %d bytes", used, bytes);
  CHECK(used + one_more + 8 > bytes - kOtherArguments, "only %d of %d bytes", used, bytes);
}

template <typename Launch>
void check_blocks(const Launch& launch) {
  int32_t block = 0;
  for (int32_t t = 0; t < launch.count; ++t) {
    CHECK(launch.first_block[t] == block, "tensor %d begins at block %d, not %d", t, launch.first_block[t], block);
    for (int64_t begin = 0; begin < launch.tensors[t].numel; begin += kChunk, ++block) {
      CHECK(find_tensor(launch, block) == t, "block %d finds tensor %d, not %d", block, find_tensor(launch, block), t);
    }
  }
  CHECK(launch.first_block[launch.count] == block, "%d blocks, not %d", launch.first_block[launch.count], block);
}

// Every tensor once and in order, `last` in the last launch alone, and short arguments wherever they are long enough.
void check_list(int64_t count, const std::vector<int>& expected) {
  std::vector<SomeTensor> tensors;
  for (int64_t i = 0; i < count; ++i) tensors.push_back({i % 5 == 2 ? 0 : i % 7 * 3000, i});
  std::vector<int> counts;
  int64_t next = 0;
  const SomeStep step{count, 0.25};
  const auto enqueue = [&](const auto& launch) {
    const bool is_short = launch.count <= Short::kCapacity;
    CHECK(sizeof(launch) == (is_short ? sizeof(Short) : sizeof(Long)), "%d tensors", launch.count);
    CHECK(launch.step.count == count && launch.step.rate == 0.25, "another step");
    check_blocks(launch);
    for (int32_t t = 0; t < launch.count; ++t, ++next) {
      const SomeTensor &got = launch.tensors[t], &sent = tensors[next];
      CHECK(got.position == next && got.numel == sent.numel, "%ld instead of %ld", got.position, next);
    }
    CHECK(launch.last == (count > 0 && next == count), "%ld of %ld tensors", next, count);
    counts.push_back(launch.count);
    return cudaSuccess;
  };
  const auto all = [](const SomeTensor&) { return true; };
  CHECK(paddle_asgd::for_each_launch(tensors.data(), step, all, enqueue) == cudaSuccess, "an error");
  CHECK(next == count && counts == expected, "%ld of %ld tensors in %zu launches", next, count, counts.size());
}

// A launch of those that belong to it, which closes the step only if the last tensor does.
void check_those_that_belong() {
  const std::vector<SomeTensor> tensors = {{5, 0}, {7, 1}, {9, 2}};
  for (const bool even : {false, true}) {
    const auto belongs = [&](const SomeTensor& t) { return (t.position % 2 == 0) == even; };
    const auto enqueue = [&](const auto& launch) {
      CHECK(launch.count == (even ? 2 : 1) && launch.last == even, "%d tensors", launch.count);
      CHECK(launch.tensors[0].position == (even ? 0 : 1), "tensor %ld", launch.tensors[0].position);
      return cudaSuccess;
    };
    CHECK(paddle_asgd::for_each_launch(tensors.data(), SomeStep{3, 0}, belongs, enqueue) == cudaSuccess, "an error");
  }
}

// The first error ends it; more blocks than a launch can have are one.
void check_errors() {
  const std::vector<SomeTensor> tensors(2 * Long::kCapacity + 1, SomeTensor{1, 0});
  const SomeStep step{static_cast<int64_t>(tensors.size()), 0};
  const auto all = [](const SomeTensor&) { return true; };
  int calls = 0;
  const auto fail = [&](const auto&) { return ++calls, cudaErrorInvalidConfiguration; };
  CHECK(paddle_asgd::for_each_launch(tensors.data(), step, all, fail) != cudaSuccess && calls == 1, "%d calls", calls);
  const SomeTensor large{kChunk * (int64_t{1} << 31), 0};
  CHECK(paddle_asgd::for_each_launch(&large, SomeStep{1, 0}, all, fail) != cudaSuccess && calls == 1, "%d calls",
        calls);
}

}  // namespace

int main() {
  constexpr int kFew = Short::kCapacity, kMany = Long::kCapacity;
  check_capacity<Short>(kShortArguments);
  check_capacity<Long>(kLongArguments);
  check_list(0, {0});
  check_list(1, {1});
  check_list(kFew, {kFew});
  check_list(kFew + 1, {kFew + 1});
  check_list(kMany, {kMany});
  check_list(kMany + 1, {kMany, 1});
  check_list(2 * kMany + kFew + 1, {kMany, kMany, kFew + 1});
  check_those_that_belong();
  check_errors();
  return 0;
}
