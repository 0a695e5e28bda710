// One copy of a function per instruction set, chosen when the library is loaded: no -march=native, yet vector code.
#pragma once

// PADDLE_ASGD_NO_CLONES is for sanitizers, which run before the loader can choose.
#if !defined(__x86_64__) || !defined(__GNUC__) || defined(__clang__) || defined(PADDLE_ASGD_NO_CLONES)
#define PADDLE_ASGD_CLONES
#elif __GNUC__ >= 12
#define PADDLE_ASGD_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define PADDLE_ASGD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#endif
