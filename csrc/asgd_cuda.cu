// SPDX-License-Identifier: Apache-2.0
// The step on the GPU: many tensors in one launch. Must not include Paddle (so that it builds and runs on its own), and
// must not write the formula again (asgd_formula.h). No allocation, no synchronisation, no copy: a step can be
// captured.
#include <cstdint>

#include "asgd_launch.h"
#include "asgd_step.h"
#include "asgd_watch.h"

namespace paddle_asgd {
namespace {

constexpr int kThreads = 256;
// Where the tests run this on the host, one thread after the other, none can wait for another.
#ifdef __CUDA_ARCH__
constexpr bool kThreadsWait = true;
__device__ inline void block_barrier() { __syncthreads(); }
#else
constexpr bool kThreadsWait = false;
__device__ inline void block_barrier() {}
#endif
static_assert(kChunk == kWatchWindow, "the watch counts blocks for windows");
static_assert(kChunk == kRefreshSpan, "a block's elements are a span");

// As many elements as fill 16 bytes of the narrowest storage type, loaded and stored in 16-byte accesses.
template <typename S, int kCount>
struct alignas(sizeof(S) * kCount < 16 ? sizeof(S) * kCount : 16) Vector {
  S at[kCount];
};

// Everything that a block needs of its tensor.
template <typename P, typename G, typename T>
struct Work {
  Typed<P, G, T> t;
  int64_t n;
  const double* weights;
  bool has_theta;
  Range fresh;
  Coefficients<T> c;

  // An access to a Vector at an address that is no multiple of its alignment faults, so the caller says which it is.
  template <int kCount, bool kAligned>
  __device__ static Vector<G, kCount> stored_at(const G* y) {
    if constexpr (kAligned) {
      return *reinterpret_cast<const Vector<G, kCount>*>(y);
    } else {
      Vector<G, kCount> stored;
#pragma unroll
      for (int k = 0; k < kCount; ++k) stored.at[k] = y[k];
      return stored;
    }
  }

  // Loads kSlots slots before it adds the first, in their order, so that a thread waits once for kSlots loads and not
  // for each. A test between two loads would put them into the same registers and bring the waits back, so whatever
  // differs between tensors is a template parameter.
  template <int kCount, bool kAligned, bool kWeighted>
  __device__ void add_history(int64_t e, double (&sum)[kCount]) const {
    // Loads of single elements take a register each, however narrow they are.
    constexpr int kSlots = kAligned ? 8 : 4;
    const G* y = t.y + e;
#pragma unroll 1
    for (int64_t begin = 0; begin < n; begin += kSlots) {
      // Behind the last slot nothing may be read: the last one is loaded again, and not added.
      const int left = static_cast<int>(min(n - begin, static_cast<int64_t>(kSlots)));
      Vector<G, kCount> stored[kSlots];
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        stored[s] = stored_at<kCount, kAligned>(y);
        if (s + 1 < left) y += t.numel;
      }
      y += t.numel;
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (s >= left) continue;
        // As the step rounds it, so that both sums are of the same numbers.
        const double weight = kWeighted ? static_cast<double>(static_cast<T>(weights[begin + s])) : 1.0;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const double number = static_cast<double>(widen(stored[s].at[k]));
          sum[k] += kWeighted ? weight * number : number;
        }
      }
    }
  }

  // In double and in the order of the slots, as on the CPU: another order would give other bits.
  template <int kCount>
  __device__ Vector<T, kCount> refreshed_sum(int64_t e) const {
    double sum[kCount] = {};
    // The slots behind the first are aligned only if a slot is a multiple of a vector.
    const bool aligned = kCount == 1 || t.numel % kCount == 0;
    if (weights == nullptr) {
      aligned ? add_history<kCount, true, false>(e, sum) : add_history<kCount, kCount == 1, false>(e, sum);
    } else {
      aligned ? add_history<kCount, true, true>(e, sum) : add_history<kCount, kCount == 1, true>(e, sum);
    }
    Vector<T, kCount> result;
#pragma unroll
    for (int k = 0; k < kCount; ++k) result.at[k] = static_cast<T>(sum[k]);
    return result;
  }

  template <int kCount, bool kFresh>
  __device__ void update(int64_t e) const {
    const auto g = *reinterpret_cast<const Vector<G, kCount>*>(t.grad + e);
    auto sum = *reinterpret_cast<Vector<T, kCount>*>(t.d + e);
    auto old = *reinterpret_cast<Vector<G, kCount>*>(t.y_i + e);
    Vector<T, kCount> x;
    Vector<P, kCount> rounded;
    // A 16-bit parameter with a master weight is not read: its value follows from the master, and the bytes are saved.
    if (t.master != nullptr) {
      x = *reinterpret_cast<Vector<T, kCount>*>(t.master + e);
    } else {
      rounded = *reinterpret_cast<Vector<P, kCount>*>(t.param + e);
#pragma unroll
      for (int k = 0; k < kCount; ++k) x.at[k] = widen(rounded.at[k]);
    }
    // Behind the loads: it waits for g, and no load may overtake a store that might change what it reads. Before the
    // history is read, of which it is a part.
    *reinterpret_cast<Vector<G, kCount>*>(t.y_i + e) = g;
    // Before `sum` changes: with a theta x moves by d as it was, without one by d as it will be.
    if (has_theta) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        x.at[k] = descend_theta<T>(x.at[k], sum.at[k], widen(old.at[k]), widen(g.at[k]), c);
      }
    }
    if constexpr (kFresh) {
      sum = refreshed_sum<kCount>(e);
    } else {
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
        sum.at[k] = replace_gradient<T>(sum.at[k], widen(old.at[k]), widen(g.at[k]), c.weight);
      }
    }
    if (!has_theta) {
#pragma unroll
      for (int k = 0; k < kCount; ++k) x.at[k] = descend<T>(x.at[k], sum.at[k], c);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) narrow(x.at[k], &rounded.at[k]);
    *reinterpret_cast<Vector<T, kCount>*>(t.d + e) = sum;
    if (t.master != nullptr) *reinterpret_cast<Vector<T, kCount>*>(t.master + e) = x;
    *reinterpret_cast<Vector<P, kCount>*>(t.param + e) = rounded;
  }

  // The elements of [begin, end) that are `kFresh`, by vectors of kCount and, where those are not possible, one by one.
  template <int kCount, bool kFresh>
  __device__ void update_range(int64_t begin, int64_t end) const {
    int64_t scalar_begin = begin;
    // A chunk begins at a multiple of every vector, so one test of the tensors' addresses is enough.
    if (aligned()) {
      scalar_begin = begin + (end - begin) / kCount * kCount;
#pragma unroll 1
      for (int64_t e = begin + threadIdx.x * kCount; e < scalar_begin; e += kThreads * kCount) {
        if (kFresh || !is_fresh(e)) update<kCount, kFresh>(e);
      }
    }
#pragma unroll 1
    for (int64_t e = scalar_begin + threadIdx.x; e < end; e += kThreads) {
      if (kFresh || !is_fresh(e)) update<1, kFresh>(e);
    }
  }

  // A refresh unit is a multiple of every vector's length, so one element speaks for all of its vector.
  __device__ bool is_fresh(int64_t e) const { return e >= fresh.begin && e < fresh.end; }

  __device__ bool aligned() const {
    const uintptr_t bits = reinterpret_cast<uintptr_t>(t.param) | reinterpret_cast<uintptr_t>(t.grad) |
                           reinterpret_cast<uintptr_t>(t.d) | reinterpret_cast<uintptr_t>(t.y_i) |
                           reinterpret_cast<uintptr_t>(t.master);
    return bits % 16 == 0;
  }
};

// The host may not know what keeps a step from being taken.
__device__ bool takes_step(const StepArgs& step) {
  if (step.found_inf != nullptr && *step.found_inf) return false;
  return !step.batch_index.given || in_range(load(step.batch_index), step.batch_num);
}

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

// Four blocks a multiprocessor: without the demand the compiler gives float64 so few registers that its loads of the
// history wait for each other, and with one for more blocks it spills.
template <typename P, typename G, typename T, int kBytes>
__global__ void __launch_bounds__(kThreads, 4) step_tensors(const PADDLE_ASGD_GRID_CONSTANT AsgdLaunch<kBytes> launch) {
  const StepArgs& step = launch.step;
  if (!takes_step(step)) return;
  const int index = find_tensor(launch, blockIdx.x);
  const TensorArgs& t = launch.tensors[index];
  const int64_t span = static_cast<int64_t>(blockIdx.x) - launch.first_block[index];
  // Divisions, loads that wait for each other, and in a weighted first pass a loop over the slots: once for a block.
  // The pointers stay with the arguments, where the compiler knows that they lead to global memory.
  __shared__ Prepared<T> shared;
  if (!kThreadsWait || threadIdx.x == 0) shared = prepare<T>(t, step, span);
  block_barrier();
  const Prepared<T> prepared = shared;
  const Work<P, G, T> work{
      typed<P, G, T>(t, prepared.slot), step.batch_num, step.batch_weights, step.has_theta, prepared.fresh, prepared.c};
  const int64_t begin = span * kChunk;
  constexpr int kNarrowest = sizeof(P) < sizeof(G) ? sizeof(P) : sizeof(G);
  work.template update_range<16 / kNarrowest, false>(begin, min(begin + kChunk, t.numel));
  // The two loops take different elements, so no barrier stands between them.
  // In a loop of its own, whose vectors are so short that every thread of the block has one of a unit, and that eight
  // slots of them fit into its registers.
  const Range fresh = prepared.fresh;
  if (fresh.begin < fresh.end) work.template update_range<16 / sizeof(T), true>(fresh.begin, fresh.end);
}

// A launch of its own, before step_tensors changes what is compared: there it would cost every block its registers.
// One thread takes one run. The order of these sums differs from run to run, and no step depends on them.
template <typename G, typename T, int kBytes>
__global__ void watch_slots(const PADDLE_ASGD_GRID_CONSTANT AsgdLaunch<kBytes> launch) {
  const StepArgs& step = launch.step;
  if (!takes_step(step)) return;
  // The blocks of step_tensors are the windows of the watch, as asserted above, so first_block counts both.
  const int64_t windows = launch.first_block[launch.count], stride = watch_stride(windows);
  const int64_t first = slot_of_step(*launch.tensors[0].m, stride);
  const int64_t window = first + (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * stride;
  if (window >= windows) return;
  const int index = find_tensor(launch, static_cast<int32_t>(window));
  const TensorArgs& t = launch.tensors[index];
  const Visit visit = visit_of(t, step);
  // What a slot holds before its first visit is no gradient, and says nothing about the next one.
  if (!visit.seen_before) return;
  const int64_t begin = watch_begin(window - launch.first_block[index], *t.m, t.numel);
  const int64_t end = min(begin + kWatchRun, t.numel);
  const G* y_i = static_cast<const G*>(t.y) + visit.slot * t.numel;
  const T share = static_cast<T>(1 / divisor(visit, t, step));
  double sum_replaced = 0, sum_centred = 0;
  for (int64_t e = begin; e < end; ++e) {
    const Squares added =
        squares<T>(widen(static_cast<const G*>(t.grad)[e]), widen(y_i[e]), static_cast<const T*>(t.d)[e], share);
    sum_replaced += added.replaced;
    sum_centred += added.centred;
  }
  // At most kWatchRuns threads of a launch come here: too few to pay for a reduction.
  atomicAdd(&step.watch[kReplaced], sum_replaced);
  atomicAdd(&step.watch[kCentred], sum_centred);
  atomicAdd(&step.watch[kSampled], static_cast<double>(end - begin));
}

// A launch of its own: within step_tensors some block might still have to read a clock that another advanced.
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
cudaError_t enqueue(const AsgdLaunch<kBytes>& launch, cudaStream_t stream) {
  const int32_t blocks = launch.first_block[launch.count];
  // No tensor, or none with an element: a launch of no blocks is an error in CUDA.
  if (blocks > 0) {
    // Kernels of one stream run one after the other, so the watch still sees what step_tensors replaces.
    if (launch.step.watch != nullptr) {
      const int64_t runs = (blocks + watch_stride(blocks) - 1) / watch_stride(blocks);
      const int32_t watchers = static_cast<int32_t>((runs + kThreads - 1) / kThreads);
      watch_slots<G, T, kBytes><<<watchers, kThreads, 0, stream>>>(launch);
    }
    step_tensors<P, G, T, kBytes><<<blocks, kThreads, 0, stream>>>(launch);
  }
  // The clocks must not advance over a step that was not taken.
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess || launch.count == 0) return error;
  advance_clocks<kBytes><<<1, kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

template <int kBytes>
cudaError_t enqueue(const AsgdLaunch<kBytes>& launch, DType param, DType grad, cudaStream_t stream) {
  // No case is the default, so that the compiler warns of a type that is missing.
  const bool grad32 = grad == DType::kFloat32;
  switch (param) {
    case DType::kFloat64:
      return enqueue<double, double, double>(launch, stream);
    case DType::kFloat16:
      return grad32 ? enqueue<Float16, float, float>(launch, stream) : enqueue<Float16, Float16, float>(launch, stream);
    case DType::kBFloat16:
      return grad32 ? enqueue<BFloat16, float, float>(launch, stream)
                    : enqueue<BFloat16, BFloat16, float>(launch, stream);
    case DType::kFloat32:
      break;
  }
  return enqueue<float, float, float>(launch, stream);
}

// As many blocks as keep the memory busy: each warp adds once to the sum, in an order that differs from run to run.
constexpr int32_t kNormBlocks = 1024;

// All threads of a warp must come here. One by one their sums would queue for the one address.
__device__ inline void add_of_warp(double* total, double value) {
#ifdef __CUDA_ARCH__
  for (int lane = 16; lane > 0; lane /= 2) value += __shfl_down_sync(0xffffffffu, value, lane);
  if (threadIdx.x % 32 != 0) return;
#endif
  atomicAdd(total, value);
}

template <typename P, typename T, int kBytes>
__global__ void add_squares(const PADDLE_ASGD_GRID_CONSTANT AsgdLaunch<kBytes> launch, double* total) {
  const StepArgs& step = launch.step;
  // Loaded here, for the host may not know it.
  const double weight_decay = load(step.weight_decay);
  double sum = 0;
  // All threads of a block stay together, `continue` included, as add_of_warp() needs it.
  for (int32_t block = blockIdx.x; block < launch.first_block[launch.count]; block += kNormBlocks) {
    const int index = find_tensor(launch, block);
    const TensorArgs& t = launch.tensors[index];
    const double known = weight_known(t.m, step.batch_index.given, step.batch_num, step.batch_weights);
    if (known == 0) continue;  // no gradient has ever reached it
    const int64_t begin = (static_cast<int64_t>(block) - launch.first_block[index]) * kChunk;
    const int64_t end = min(begin + kChunk, t.numel);
    for (int64_t e = begin + threadIdx.x; e < end; e += kThreads) {
      const T x = t.master == nullptr ? widen(static_cast<const P*>(t.param)[e]) : static_cast<const T*>(t.master)[e];
      const double gradient = known_gradient<T>(x, static_cast<const T*>(t.d)[e], weight_decay, known);
      sum += gradient * gradient;
    }
  }
  add_of_warp(total, sum);
}

template <typename P, typename T, int kBytes>
cudaError_t enqueue_norm(const AsgdLaunch<kBytes>& launch, double* sum, cudaStream_t stream) {
  const int32_t blocks = launch.first_block[launch.count];
  if (blocks > 0) add_squares<P, T, kBytes><<<min(blocks, kNormBlocks), kThreads, 0, stream>>>(launch, sum);
  return cudaGetLastError();
}

template <int kBytes>
cudaError_t enqueue_norm(const AsgdLaunch<kBytes>& launch, DType param, double* sum, cudaStream_t stream) {
  switch (param) {
    case DType::kFloat64:
      return enqueue_norm<double, double>(launch, sum, stream);
    case DType::kFloat16:
      return enqueue_norm<Float16, float>(launch, sum, stream);
    case DType::kBFloat16:
      return enqueue_norm<BFloat16, float>(launch, sum, stream);
    case DType::kFloat32:
      break;
  }
  return enqueue_norm<float, float>(launch, sum, stream);
}

}  // namespace

const char* asgd_cuda(const StepArgs& step, int device, void* stream) {
  return on_device(device, [&]() {
    cudaError_t error = cudaSuccess;
    // The types of the last tensor come last, for its launch closes the step.
    for (const bool last : {false, true}) {
      for (const auto& types : kTypes) {
        const bool closes = step.count > 0 && is_of(step.tensors[step.count - 1], types);
        if (error != cudaSuccess || closes != last) continue;
        error = for_each_launch(step, types, [&](const auto& launch) {
          return enqueue(launch, types[0], types[1], static_cast<cudaStream_t>(stream));
        });
      }
    }
    return error;
  });
}

const char* asgd_norm_cuda(const StepArgs& step, double* sum, int device, void* stream) {
  return on_device(device, [&]() {
    cudaError_t error = cudaSuccess;
    // The order of the launches does not matter: each adds to the same sum.
    for (const auto& types : kTypes) {
      if (error != cudaSuccess) return error;
      error = for_each_launch(step, types, [&](const auto& launch) {
        return enqueue_norm(launch, types[0], sum, static_cast<cudaStream_t>(stream));
      });
    }
    return error;
  });
}

}  // namespace paddle_asgd
