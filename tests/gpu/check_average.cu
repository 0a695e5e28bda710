// SPDX-License-Identifier: Apache-2.0
// Whether the GPU's kernels of averages give the bits of the CPU's: every pair of storage types, weights, odd offsets,
// many tensors, copies and exchanges. A line of JSON for each check, exit status 1 for a difference. `check_average
// [flip]`: one bit wrong on purpose.
#include "device.h"
#include "pairs.h"

namespace gpu {
namespace {

using native_test::Pair;
using native_test::PairList;
using paddle_asgd::AverageArgs;
using paddle_asgd::DType;
using paddle_asgd::PairArgs;
using paddle_asgd::Pairs;

bool flip = false, whole = true;
constexpr DType kAll[] = {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16};

// Where the elements lie in device memory, as far behind an aligned address as on the host.
constexpr size_t kAlignment = 256;

// One tensor of a pair on the device.
class Copy {
 public:
  explicit Copy(const native_test::Buffer& buffer)
      : host_(buffer), offset_(reinterpret_cast<uintptr_t>(buffer.data()) % 16), memory_(kAlignment + size()) {
    if (size() > 0) CUDA(cudaMemcpy(data(), host_.data(), size(), cudaMemcpyHostToDevice));
  }
  void* data() const { return size() == 0 ? nullptr : memory_.at(offset_); }
  // All bits, but for those of a NaN that arithmetic made: each processor has its own.
  bool equals_host(DType dtype, int64_t numel) const {
    std::string bytes(size(), '\0');
    if (size() > 0) CUDA(cudaMemcpy(&bytes[0], data(), size(), cudaMemcpyDeviceToHost));
    bool equal = true;
    for (int64_t e = 0; e < numel && bytes != host_.bytes(); ++e) {
      equal &= same(native_test::Buffer::read(bytes.data(), dtype, e), host_.at(e));
    }
    return equal;
  }
  void flip_a_bit() const {
    uint8_t byte;
    CUDA(cudaMemcpy(&byte, data(), 1, cudaMemcpyDeviceToHost));
    byte ^= 1;
    CUDA(cudaMemcpy(data(), &byte, 1, cudaMemcpyHostToDevice));
  }

 private:
  size_t size() const { return host_.bytes().size(); }
  const native_test::Buffer& host_;
  size_t offset_;
  Memory memory_;
};

// Does the same to pairs on the host and to their copies on the device, and compares all bytes.
void compare(const PairList& pairs, Pairs AverageArgs::* list, double weight, bool as_bytes, Tally* tally) {
  std::vector<Copy> first, second;
  std::vector<PairArgs> here, there;
  first.reserve(pairs.size());
  second.reserve(pairs.size());
  for (const auto& pair : pairs) {
    here.push_back(as_bytes ? pair->bytes() : pair->args());
    first.emplace_back(pair->first);
    second.emplace_back(pair->second);
    there.push_back(here.back());
    there.back().first = first.back().data();
    there.back().second = second.back().data();
  }
  AverageArgs host{}, device{};
  host.*list = native_test::list_of(here, weight);
  device.*list = native_test::list_of(there, weight);
  paddle_asgd::average_cpu(host);
  const char* error = paddle_asgd::average_cuda(device, 0, nullptr);
  CHECK(error == nullptr, "%s", error);
  CUDA(cudaDeviceSynchronize());
  if (flip) first[1].flip_a_bit();
  for (size_t i = 0; i < pairs.size(); ++i) {
    tally->count(2);
    const std::string where = "types " + std::to_string(static_cast<int>(pairs[i]->first_dtype)) + " and " +
                              std::to_string(static_cast<int>(pairs[i]->second_dtype)) + ", tensor " +
                              std::to_string(i);
    if (!first[i].equals_host(pairs[i]->first_dtype, pairs[i]->numel)) tally->differ(where + ", first");
    if (!second[i].equals_host(pairs[i]->second_dtype, pairs[i]->numel)) tally->differ(where + ", second");
  }
}

void check_averages() {
  Tally tally("averages");
  for (const DType value : kAll) {
    for (const double weight : {0.0, 0.001, 0.3, 1.0}) {
      for (const DType average : {DType::kFloat32, DType::kFloat64}) {
        if (average == DType::kFloat32 && value == DType::kFloat64) continue;
        compare(native_test::pairs_of(average, value), &AverageArgs::averaged, weight, false, &tally);
      }
    }
  }
  compare(native_test::pairs_of(DType::kFloat32, DType::kFloat32, 2000), &AverageArgs::averaged, 0.3, false, &tally);
  whole &= tally.report();
}

void check_rounded() {
  Tally tally("rounded averages");
  for (const DType source : {DType::kFloat32, DType::kFloat64}) {
    for (const DType target : kAll) {
      if (source == target) continue;
      compare(native_test::pairs_of(target, source), &AverageArgs::rounded, 0, false, &tally);
    }
  }
  whole &= tally.report();
}

void check_bytes() {
  Tally tally("copies and exchanges");
  for (const DType dtype : kAll) {
    compare(native_test::pairs_of(dtype, dtype, 40), &AverageArgs::copied, 0, true, &tally);
    compare(native_test::pairs_of(dtype, dtype, 40), &AverageArgs::exchanged, 0, true, &tally);
  }
  whole &= tally.report();
}

}  // namespace
}  // namespace gpu

int main(int argc, char** argv) {
  using namespace gpu;
  flip = argc > 1 && std::string(argv[1]) == "flip";
  check_averages();
  check_rounded();
  check_bytes();
  return whole ? 0 : 1;
}
