// SPDX-License-Identifier: Apache-2.0
// What the threads of one block do to the elements of its tensor, for the kernel of asgd_step_cuda.cu. Must not launch
// anything, and must not write the formula again (asgd_formula.h).
#pragma once

#include <cstdint>

#include "asgd_launch.h"
#include "asgd_step.h"

namespace paddle_asgd {
namespace {

// Everything that a block needs of its tensor. What is a template parameter below would otherwise be a test within the
// loop over the elements.
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
      // Nothing may be read behind the last slot, so the last one is loaded again, and not added.
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
        // The weight is rounded as the step rounds it, so that both sums are of the same numbers.
        const double weight = kWeighted ? static_cast<double>(static_cast<T>(weights[begin + s])) : 1.0;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
          const double number = static_cast<double>(widen(stored[s].at[k]));
          sum[k] += kWeighted ? weight * number : number;
        }
      }
    }
  }

  // The sum is in double and in the order of the slots, as on the CPU: another order would give other bits.
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
    // This store comes after the loads, because it waits for g, and the compiler may not move a load before a store
    // that might change what it reads. It comes before refreshed_sum(), which reads the history that it is a part of.
    *reinterpret_cast<Vector<G, kCount>*>(t.y_i + e) = g;
    // With a theta x moves by d as it was, so this comes before `sum` changes; without one, by d as it will be.
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

}  // namespace
}  // namespace paddle_asgd
