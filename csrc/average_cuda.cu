// SPDX-License-Identifier: Apache-2.0
// The averages of a model's weights on a GPU, many tensors in one launch. Must not include Paddle, and must not write
// the formula again (average_formula.h).
#include <vector>

#include "average_formula.h"
#include "average_kernel.h"
#include "cuda_launch.h"
#include "half.h"

namespace paddle_asgd {
namespace {

// What a block does to its share of one pair: each is a kernel of its own.

template <typename T, typename V>
struct Averaged {
  static __device__ void at(const PairArgs& pair, int64_t e, double weight) {
    T* a = static_cast<T*>(pair.first) + e;
    const T x = static_cast<T>(widen(static_cast<const V*>(pair.second)[e]));
    *a = average<T>(*a, x, static_cast<T>(weight));
  }
};

template <typename P, typename T>
struct Rounded {
  static __device__ void at(const PairArgs& pair, int64_t e, double) {
    narrow(static_cast<const T*>(pair.second)[e], static_cast<P*>(pair.first) + e);
  }
};

template <typename Unit>
struct Copied {
  static __device__ void at(const PairArgs& pair, int64_t e, double) {
    static_cast<Unit*>(pair.first)[e] = static_cast<const Unit*>(pair.second)[e];
  }
};

template <typename Unit>
struct Exchanged {
  static __device__ void at(const PairArgs& pair, int64_t e, double) {
    Unit *a = static_cast<Unit*>(pair.first) + e, *b = static_cast<Unit*>(pair.second) + e;
    const Unit kept = *a;
    *a = *b;
    *b = kept;
  }
};

template <int kBytes>
using PairLaunch = Launch<PairArgs, Pairs, kBytes>;

template <typename Work, int kBytes>
__global__ void work_on_pairs(const PADDLE_ASGD_GRID_CONSTANT PairLaunch<kBytes> launch) {
  const int index = find_tensor(launch, static_cast<int32_t>(blockIdx.x));
  const PairArgs& pair = launch.tensors[index];
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) - launch.first_block[index]) * kChunk;
  const int64_t end = begin + kChunk < pair.numel ? begin + kChunk : pair.numel;
  for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) Work::at(pair, e, launch.step.weight);
}

template <typename Work, int kBytes>
cudaError_t enqueue(const PairLaunch<kBytes>& launch, cudaStream_t stream) {
  const int32_t blocks = launch.first_block[launch.count];
  if (blocks > 0) work_on_pairs<Work, kBytes><<<blocks, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

// Enqueues one kind of work for the pairs that `belongs` takes.
template <typename Work, typename Belongs>
cudaError_t run(const Pairs& pairs, cudaStream_t stream, cudaError_t before, const Belongs& belongs) {
  if (before != cudaSuccess) return before;
  return for_each_launch(pairs.begin, pairs, belongs,
                         [&](const auto& launch) { return enqueue<Work>(launch, stream); });
}

template <typename T, typename V>
cudaError_t run_averaged(const Pairs& pairs, cudaStream_t stream, cudaError_t before, DType average, DType value) {
  return run<Averaged<T, V>>(pairs, stream, before, [&](const PairArgs& pair) {
    return pair.first_dtype == average && pair.second_dtype == value;
  });
}

cudaError_t run_averaged(const Pairs& pairs, cudaStream_t stream) {
  constexpr DType kFloat = DType::kFloat32, kDouble = DType::kFloat64;
  cudaError_t error = run_averaged<float, float>(pairs, stream, cudaSuccess, kFloat, kFloat);
  error = run_averaged<float, Float16>(pairs, stream, error, kFloat, DType::kFloat16);
  error = run_averaged<float, BFloat16>(pairs, stream, error, kFloat, DType::kBFloat16);
  error = run_averaged<double, float>(pairs, stream, error, kDouble, kFloat);
  error = run_averaged<double, double>(pairs, stream, error, kDouble, kDouble);
  error = run_averaged<double, Float16>(pairs, stream, error, kDouble, DType::kFloat16);
  return run_averaged<double, BFloat16>(pairs, stream, error, kDouble, DType::kBFloat16);
}

template <typename P, typename T>
cudaError_t run_rounded(const Pairs& pairs, cudaStream_t stream, cudaError_t before, DType to, DType from) {
  return run<Rounded<P, T>>(pairs, stream, before,
                            [&](const PairArgs& pair) { return pair.first_dtype == to && pair.second_dtype == from; });
}

cudaError_t run_rounded(const Pairs& pairs, cudaStream_t stream, cudaError_t before) {
  constexpr DType kFloat = DType::kFloat32, kDouble = DType::kFloat64;
  cudaError_t error = run_rounded<double, float>(pairs, stream, before, kDouble, kFloat);
  error = run_rounded<Float16, float>(pairs, stream, error, DType::kFloat16, kFloat);
  error = run_rounded<BFloat16, float>(pairs, stream, error, DType::kBFloat16, kFloat);
  error = run_rounded<float, double>(pairs, stream, error, kFloat, kDouble);
  error = run_rounded<Float16, double>(pairs, stream, error, DType::kFloat16, kDouble);
  return run_rounded<BFloat16, double>(pairs, stream, error, DType::kBFloat16, kDouble);
}

// Bytes in units of four where addresses and size allow that, which nearly always they do, and one by one elsewhere.
bool in_words(const PairArgs& pair) {
  return ((reinterpret_cast<uintptr_t>(pair.first) | reinterpret_cast<uintptr_t>(pair.second) |
           static_cast<uintptr_t>(pair.numel)) &
          3u) == 0;
}

template <template <typename> class Work>
cudaError_t run_bytes(const Pairs& pairs, cudaStream_t stream, cudaError_t before) {
  std::vector<PairArgs> words, bytes;
  for (int64_t i = 0; i < pairs.count; ++i) {
    PairArgs pair = pairs.begin[i];
    const bool whole = in_words(pair);
    if (whole) pair.numel /= 4;
    (whole ? words : bytes).push_back(pair);
  }
  const auto all = [](const PairArgs&) { return true; };
  const Pairs in_fours{words.data(), static_cast<int64_t>(words.size()), 0};
  const Pairs in_ones{bytes.data(), static_cast<int64_t>(bytes.size()), 0};
  if (in_fours.count > 0) before = run<Work<uint32_t>>(in_fours, stream, before, all);
  if (in_ones.count > 0) before = run<Work<uint8_t>>(in_ones, stream, before, all);
  return before;
}

}  // namespace

const char* average_cuda(const AverageArgs& args, int device, void* stream_of_paddle) {
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_of_paddle);
  return on_device(device, [&]() {
    cudaError_t error = cudaSuccess;
    if (args.averaged.count > 0) error = run_averaged(args.averaged, stream);
    if (args.rounded.count > 0) error = run_rounded(args.rounded, stream, error);
    error = run_bytes<Copied>(args.copied, stream, error);
    return run_bytes<Exchanged>(args.exchanged, stream, error);
  });
}

}  // namespace paddle_asgd
