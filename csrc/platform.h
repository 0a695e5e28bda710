// SPDX-License-Identifier: Apache-2.0
// Macros that adapt functions to the compiler and the processor. Must not hold code.
#pragma once

// A function that is only called keeps the instructions of the oldest processor; one that is inlined takes its clone's.
#define PADDLE_ASGD_INLINE inline __attribute__((always_inline))

#ifdef __CUDACC__
#define PADDLE_ASGD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define PADDLE_ASGD_HOST_DEVICE PADDLE_ASGD_INLINE
#endif

// One copy for each instruction set. The loader chooses before a sanitizer is ready, so its builds define NO_CLONES.
#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__) || defined(PADDLE_ASGD_NO_CLONES)
#define PADDLE_ASGD_CLONES
#elif __GNUC__ >= 12
#define PADDLE_ASGD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PADDLE_ASGD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
