// SPDX-License-Identifier: Apache-2.0
// The averages of a model's weights, from what Paddle hands over to the kernel's arguments. Must not compute, nor read
// a tensor itself (paddle_tensor.h).
#include "paddle_average_op.h"

#include <string>
#include <vector>

#include "average_kernel.h"

namespace paddle_asgd {
namespace {

bool is_floating(DataType dtype) {
  return is_16_bit(dtype) || dtype == DataType::FLOAT32 || dtype == DataType::FLOAT64;
}

// The device of a call: that of its first tensor that has memory. Null: there is none, and nothing to do.
const Tensor* first_with_memory(std::initializer_list<const Tensors*> lists) {
  for (const Tensors* list : lists) {
    for (const Tensor* t : *list) {
      const DenseTensor* dense = dense_tensor(*t);
      if (dense != nullptr && extent_of(*dense).numel > 0 && memory_of(*dense, 0).place != nullptr) return t;
    }
  }
  return nullptr;
}

void fetch_ahead(const Tensors& first, const Tensors& second, size_t i) {
  if (i + kAhead >= first.size()) return;
  fetch_description(*first[i + kAhead]);
  fetch_description(*second[i + kAhead]);
}

PairArgs pair_of(void* first, void* second, int64_t numel, DataType first_dtype, DataType second_dtype) {
  return PairArgs{first, second, numel, kernel_dtype(first_dtype), kernel_dtype(second_dtype)};
}

// Both dense, in one piece, of one shape and dtype; as bytes.
PairArgs check_bytes(const Check& check, const char* what, const Tensor& first, const Tensor& second) {
  const DenseTensor& value = check.dense("value", second);
  const phi::DenseTensorMeta& meta = value.meta();
  PairArgs pair{};
  pair.first = check.like(what, first, meta.dims, meta.dtype);
  pair.second = check.memory("value", value);
  pair.numel = extent_of(value).numel * static_cast<int64_t>(phi::SizeOf(meta.dtype));
  return pair;
}

PairArgs check_average(const Check& check, const Tensor& average, const Tensor& value) {
  const DenseTensor& followed = check.dense("value", value);
  const DataType dtype = followed.meta().dtype;
  if (!is_floating(dtype)) check.fail("dtype", show(dtype), "float16, bfloat16, float32 or float64");
  const DenseTensor& held = check.dense("average", average);
  const DataType wide = held.meta().dtype;
  if (dtype == DataType::FLOAT64 && wide != dtype) check.fail("dtype of the average", show(wide), "float64");
  if (wide != DataType::FLOAT32 && wide != DataType::FLOAT64) {
    check.fail("dtype of the average", show(wide), "float32 or float64");
  }
  void* first = check.like("average", held, followed.meta().dims, wide);
  return pair_of(first, check.memory("value", followed), extent_of(followed).numel, wide, dtype);
}

void check_pairs(const char* what, const TensorPairs& pairs) {
  if (pairs.first.size() == pairs.second.size()) return;
  refuse(std::string("number of ") + what, std::to_string(pairs.first.size()), std::to_string(pairs.second.size()));
}

Pairs pairs(const std::vector<PairArgs>& args, double weight = 0) {
  return Pairs{args.data(), static_cast<int64_t>(args.size()), weight};
}

}  // namespace

PreparedAverages prepare(const AverageUpdate& r) {
  check_pairs("averages", r.averaged);
  check_pairs("copies", r.copied);
  PreparedAverages prepared;
  prepared.first = first_with_memory({&r.averaged.second, &r.copied.second, &r.averaged.first, &r.copied.first});
  const Place place = prepared.first == nullptr ? Place() : prepared.first->place();
  prepared.averaged.reserve(r.averaged.first.size());
  for (size_t i = 0; i < r.averaged.first.size(); ++i) {
    fetch_ahead(r.averaged.first, r.averaged.second, i);
    const Tensor& value = *r.averaged.second[i];
    prepared.averaged.push_back(check_average(Check(value, i, place), *r.averaged.first[i], value));
  }
  for (size_t i = 0; i < r.copied.first.size(); ++i) {
    const Tensor& value = *r.copied.second[i];
    prepared.copied.push_back(check_bytes(Check(value, i, place), "copy", *r.copied.first[i], value));
  }
  return prepared;
}

AverageArgs complete(const PreparedAverages& prepared, double weight) {
  // Not weight < 0 || weight > 1, which is false of NaN.
  if (!(weight >= 0 && weight <= 1)) refuse("weight", show(weight), "a number from 0 to 1");
  AverageArgs args{};
  args.averaged = pairs(prepared.averaged, weight);
  args.copied = pairs(prepared.copied);
  return args;
}

void average_run(const Tensor* first, const AverageArgs& args) {
  if (first == nullptr) return;
  run_on_device(
      *first, [&]() { average_cpu(args); },
      [&](int device, void* stream) { return average_cuda(args, device, stream); });
}

namespace {

// A target of its source's dtype is copied, any other is rounded.
void check_assigned(const AverageSwap& r, const Place& place, std::vector<PairArgs>* rounded,
                    std::vector<PairArgs>* copied) {
  for (size_t i = 0; i < r.assigned.first.size(); ++i) {
    const Tensor &target = *r.assigned.first[i], &source = *r.assigned.second[i];
    const Check check(target, i, place);
    const DenseTensor &to = check.dense("value", target), &from = check.dense("source", source);
    const DataType dtype = to.meta().dtype, wide = from.meta().dtype;
    if (dtype == wide) {
      copied->push_back(check_bytes(check, "value", target, source));
      continue;
    }
    if (!is_floating(dtype)) check.fail("dtype", show(dtype), "float16, bfloat16, float32 or float64");
    if (wide != DataType::FLOAT32 && wide != DataType::FLOAT64) {
      check.fail("dtype of the source", show(wide), "float32, float64 or " + show(dtype));
    }
    void* first = check.memory("value", to);
    rounded->push_back(
        pair_of(first, check.like("source", from, to.meta().dims, wide), extent_of(to).numel, dtype, wide));
  }
}

}  // namespace

void average_swap(const AverageSwap& r) {
  check_pairs("tensors to exchange", r.exchanged);
  check_pairs("targets", r.assigned);
  const Tensor* first =
      first_with_memory({&r.exchanged.second, &r.assigned.first, &r.exchanged.first, &r.assigned.second});
  const Place place = first == nullptr ? Place() : first->place();
  std::vector<PairArgs> exchanged, rounded, copied;
  exchanged.reserve(r.exchanged.first.size());
  for (size_t i = 0; i < r.exchanged.first.size(); ++i) {
    fetch_ahead(r.exchanged.first, r.exchanged.second, i);
    const Tensor& value = *r.exchanged.second[i];
    exchanged.push_back(check_bytes(Check(value, i, place), "average", *r.exchanged.first[i], value));
  }
  check_assigned(r, place, &rounded, &copied);
  AverageArgs args{};
  args.rounded = pairs(rounded);
  args.copied = pairs(copied);
  args.exchanged = pairs(exchanged);
  average_run(first, args);
}

}  // namespace paddle_asgd
