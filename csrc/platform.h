// SPDX-License-Identifier: Apache-2.0
// Macros that adapt functions to the compiler and the processor. Must not hold code, nor include anything.
#pragma once

// Forces inlining, so that a function takes the instruction set of the clone that it is inlined into.
#define PADDLE_ASGD_INLINE inline __attribute__((always_inline))

// A function for host and device alike.
#ifdef __CUDACC__
#define PADDLE_ASGD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PADDLE_ASGD_HOST_DEVICE PADDLE_ASGD_INLINE
#endif

// One copy of a function per instruction set, chosen when the library is loaded: no -march=native, yet vector code.
// PADDLE_ASGD_NO_CLONES is for sanitizers, which run before the loader can choose.
#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__) || defined(PADDLE_ASGD_NO_CLONES)
#define PADDLE_ASGD_CLONES
#elif __GNUC__ >= 12
#define PADDLE_ASGD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PADDLE_ASGD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
