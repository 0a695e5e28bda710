// SPDX-License-Identifier: Apache-2.0
// Pairs of tensors for the tests of averages: filled, and listed as the kernels take them. Must not know what is
// expected of a kernel.
#pragma once

#include "average_kernel.h"
#include "tensors.h"

namespace native_test {

using paddle_asgd::AverageArgs;
using paddle_asgd::PairArgs;
using paddle_asgd::Pairs;

// Empty, one element, less than a block, more than one, more than a chunk of the GPU.
constexpr int64_t kSizes[] = {0, 1, 257, 511, 4096 + 513};

// Two tensors at odd offsets that differ, so that no load may count on an alignment.
struct Pair {
  Pair(DType first_, DType second_, int64_t numel_, uint64_t seed)
      : first_dtype(first_),
        second_dtype(second_),
        numel(numel_),
        first(first_, numel_, seed % 3),
        second(second_, numel_, 1 + seed % 5) {
    Random random(seed);
    for (int64_t e = 0; e < numel; ++e) first.put(e, random.number()), second.put(e, random.number());
    // What has no difference, and what is not finite, stays what the formula makes of it.
    if (numel > 200) first.put(7, second.at(7)), second.put(9, INFINITY), first.put(11, NAN), first.put(13, -0.0);
  }
  PairArgs args() const { return {first.data(), second.data(), numel, first_dtype, second_dtype}; }
  // As tensors without a dtype.
  PairArgs bytes() const { return {first.data(), second.data(), static_cast<int64_t>(first.bytes().size()), {}, {}}; }

  DType first_dtype, second_dtype;
  int64_t numel;
  Buffer first, second;
};

using PairList = std::vector<std::unique_ptr<Pair>>;

inline PairList pairs_of(DType first, DType second, size_t count = 0) {
  PairList pairs;
  for (const int64_t numel : kSizes) pairs.emplace_back(new Pair(first, second, numel, 3 + pairs.size()));
  // More than one launch holds.
  while (pairs.size() < count) pairs.emplace_back(new Pair(first, second, pairs.size() % 7, pairs.size()));
  return pairs;
}

template <typename Take>
std::vector<PairArgs> listed(const PairList& pairs, const Take& take) {
  std::vector<PairArgs> args;
  for (const auto& pair : pairs) args.push_back(take(*pair));
  return args;
}

inline Pairs list_of(const std::vector<PairArgs>& args, double weight = 0) {
  return Pairs{args.data(), static_cast<int64_t>(args.size()), weight};
}

}  // namespace native_test
