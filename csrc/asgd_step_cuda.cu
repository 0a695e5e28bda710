// SPDX-License-Identifier: Apache-2.0
// The step on the GPU: many tensors in one launch. Must not include Paddle, nor write the formula again
// (asgd_formula.h), nor allocate, wait or copy: a graph that captures a step could not replay it.
#include <cstdint>
#include <type_traits>

#include "asgd_launch.h"
#include "asgd_narrow_cuda.h"
#include "asgd_update_cuda.h"
#include "asgd_watch_cuda.h"

namespace paddle_asgd {
namespace {

static_assert(kChunk == kRefreshSpan, "a block's elements are a span");

// What a block needs to know of its tensor besides where it lies.
template <typename T>
struct Prepared {
  int64_t slot;
  Range fresh;
  Coefficients<T> c;
};

template <typename T>
__device__ Prepared<T> prepare(const TensorArgs& t, const StepArgs& step, int64_t span) {
  const Visit visit = visit_of(t, step);
  return Prepared<T>{visit.slot, refreshed_in(refresh_of(*t.m, step.batch_num, t.numel), span, t.numel),
                     coefficients_of<T>(step, visit, divisor(visit, t, step))};
}

// One thread of a block does the divisions, the loads that wait for each other and, in a weighted first pass, the loop
// over the slots. The pointers stay in the arguments, where the compiler knows that they lead to global memory.
template <typename T>
__device__ Prepared<T> prepare_once(const TensorArgs& t, const StepArgs& step, int64_t span) {
  __shared__ Prepared<T> shared;
  if (!kThreadsWait || threadIdx.x == 0) shared = prepare<T>(t, step, span);
  block_barrier();
  return shared;
}

// Four blocks a multiprocessor are demanded: without the demand the compiler gives float64 so few registers that its
// loads of the history wait for each other, and with one for more blocks it spills.
template <typename P, typename G, typename T, int kBytes>
__global__ void __launch_bounds__(kThreads, 4) step_tensors(const PADDLE_ASGD_GRID_CONSTANT AsgdLaunch<kBytes> launch) {
  const StepArgs& step = launch.step;
  if (!takes_step(step)) return;
  const int index = find_tensor(launch, blockIdx.x);
  const TensorArgs& t = launch.tensors[index];
  const int64_t span = static_cast<int64_t>(blockIdx.x) - launch.first_block[index];
  const Prepared<T> prepared = prepare_once<T>(t, step, span);
  const Work<P, G, T> work{
      typed<P, G, T>(t, prepared.slot), step.batch_num, step.batch_weights, step.has_theta, prepared.fresh, prepared.c};
  const int64_t begin = span * kChunk;
  constexpr int kNarrowest = sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G);
  work.template update_range<16 / kNarrowest, false>(begin, min(begin + kChunk, t.numel));
  // The two loops take different elements, so no barrier stands between them. The vectors of the second are so short
  // that every thread of the block has one of a unit, and that eight slots of them fit into its registers.
  const Range fresh = prepared.fresh;
  if (fresh.begin < fresh.end) work.template update_range<16 / sizeof(T), true>(fresh.begin, fresh.end);
}

// The same for tensors with a narrow history. With registers for four blocks float64 would spill.
template <typename P, typename G, typename T, int kBytes>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    step_narrow_tensors(const PADDLE_ASGD_GRID_CONSTANT AsgdLaunch<kBytes> launch) {
  const StepArgs& step = launch.step;
  if (!takes_step(step)) return;
  const int index = find_tensor(launch, blockIdx.x);
  const TensorArgs& t = launch.tensors[index];
  const int64_t span = static_cast<int64_t>(blockIdx.x) - launch.first_block[index];
  const Prepared<T> prepared = prepare_once<T>(t, step, span);
  const int64_t begin = span * kChunk, end = min(begin + kChunk, t.numel);
  const auto update = [&](auto* y) {
    const NarrowWork<std::remove_pointer_t<decltype(y)>, P, G, T> work{typed<P, G, T>(t, prepared.slot),
                                                                       y,
                                                                       t.y_scale,
                                                                       prepared.slot,
                                                                       step.batch_num,
                                                                       step.batch_weights,
                                                                       step.has_theta,
                                                                       prepared.fresh,
                                                                       prepared.c};
    work.update_range(begin, end);
  };
  t.history == History::kInt16 ? update(static_cast<int16_t*>(t.y)) : update(static_cast<int8_t*>(t.y));
}

// This is a launch of its own, because within step_tensors some block might still have to read a clock that another has
// advanced.
template <int kBytes>
__global__ void advance_clocks(const PADDLE_ASGD_GRID_CONSTANT AsgdLaunch<kBytes> launch) {
  const StepArgs& step = launch.step;
  const bool takes = takes_step(step), watches = launch.last && step.watch != nullptr && threadIdx.x == 0;
  if (!takes) {
    // A step that found an Inf is no refusal, whatever its index is.
    const bool skipped = step.found_inf != nullptr && *step.found_inf;
    if (watches && !skipped) refuse_index(step.watch, load(step.batch_index));
    return;
  }
  // One block is enough: there is one clock a tensor. Only the last launch of a step may count it in the watch.
  for (int t = threadIdx.x; t < launch.count; t += blockDim.x) {
    const TensorArgs& tensor = launch.tensors[t];
    advance(tensor.m, visit_of(tensor, step), step.batch_index.given);
  }
  if (watches) close_step(step.watch, step.batch_num);
}

template <typename P, typename G, typename T, int kBytes>
cudaError_t enqueue(const AsgdLaunch<kBytes>& launch, bool is_narrow, cudaStream_t stream) {
  const int32_t blocks = launch.first_block[launch.count];
  // No tensor, or none with an element: a launch of no blocks is an error in CUDA.
  if (blocks > 0) {
    // Kernels of one stream run one after the other, so the watch still sees what step_tensors replaces.
    if (launch.step.watch != nullptr) {
      const int64_t runs = (blocks + watch_stride(blocks) - 1) / watch_stride(blocks);
      const int32_t watchers = static_cast<int32_t>((runs + kThreads - 1) / kThreads);
      watch_slots<G, T, kBytes><<<watchers, kThreads, 0, stream>>>(launch);
    }
    if (is_narrow) {
      step_narrow_tensors<P, G, T, kBytes><<<blocks, kThreads, 0, stream>>>(launch);
    } else {
      step_tensors<P, G, T, kBytes><<<blocks, kThreads, 0, stream>>>(launch);
    }
  }
  // The clocks must not advance over a step that was not taken.
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || launch.count == 0) return error;
  advance_clocks<kBytes><<<1, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

bool narrow(const TensorArgs& t) { return t.history != History::kExact; }

// Calls `call` with each pair of storage types and with each kind of history: what one launch's tensors share.
template <typename Call>
void for_each_kind(const Call& call) {
  for (const auto& types : kTypes) {
    for (const bool is_narrow : {false, true}) call(types, is_narrow);
  }
}

}  // namespace

const char* asgd_cuda(const StepArgs& step, int device, void* stream) {
  return on_device(device, [&]() {
    cudaError_t error = cudaSuccess;
    // The kind of the last tensor comes last, for its launch closes the step.
    for (const bool last : {false, true}) {
      for_each_kind([&](const auto& types, bool is_narrow) {
        const auto belongs = [&](const TensorArgs& t) { return is_of(t, types) && is_narrow == narrow(t); };
        const bool closes = step.count > 0 && belongs(step.tensors[step.count - 1]);
        if (error != cudaSuccess || closes != last) return;
        error = for_each_launch(step.tensors, step, belongs, [&](const auto& launch) {
          return with_types(types, [&](auto pair) {
            using Pair = decltype(pair);
            return enqueue<typename Pair::P, typename Pair::G, typename Pair::T>(launch, is_narrow,
                                                                                 static_cast<cudaStream_t>(stream));
          });
        });
      });
    }
    return error;
  });
}

}  // namespace paddle_asgd
