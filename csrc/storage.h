// SPDX-License-Identifier: Apache-2.0
// half.h's conversions for arrays on the CPU, by the processor's instructions where it has them. The same bits, except
// that a signalling NaN may be widened to the quiet one that the first operation would make of it. Must not convert in
// any third way.
#pragma once

#include "half.h"
#include "platform.h"

// PADDLE_ASGD_NO_F16C is for tests: it takes the instructions away, as on a processor that has none.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(PADDLE_ASGD_NO_F16C)
#define PADDLE_ASGD_F16C 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define PADDLE_ASGD_F16C 0
#endif

namespace paddle_asgd {
namespace {

// Elements that pass through buffers at once, and stay in the first-level cache. Rounding them in a pass of its own was
// measured to be faster than within the loop that computes them, for bfloat16 too. With 1,024 elements the buffers no
// longer fit beside the tensors, all of which begin on a page.
constexpr int64_t kBlock = 512;

// The arrays never overlap; without __restrict__ the compiler would test that before each loop.
PADDLE_ASGD_CLONES void widen_in_integers(const Float16* __restrict__ from, float* __restrict__ to, int64_t count) {
  for (int64_t e = 0; e < count; ++e) to[e] = widen(from[e]);
}

PADDLE_ASGD_CLONES void narrow_in_integers(const float* __restrict__ from, Float16* __restrict__ to, int64_t count) {
  for (int64_t e = 0; e < count; ++e) narrow(from[e], &to[e]);
}

PADDLE_ASGD_CLONES void widen_array(const BFloat16* __restrict__ from, float* __restrict__ to, int64_t count) {
  for (int64_t e = 0; e < count; ++e) to[e] = widen(from[e]);
}

PADDLE_ASGD_CLONES void narrow_array(const float* __restrict__ from, BFloat16* __restrict__ to, int64_t count) {
  for (int64_t e = 0; e < count; ++e) narrow(from[e], &to[e]);
}

#if PADDLE_ASGD_F16C

// AVX2 is needed around the conversions: without it gcc 12 makes the blend of narrow_by_processor() scalar.
#define PADDLE_ASGD_F16C_TARGET __attribute__((target("avx2,f16c")))

// gcc before 11 does not know the name "f16c", so its bit is read; "avx2" has the operating system's consent, too.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0 && __builtin_cpu_supports("avx2");
}

// The processor is asked once, because cpuid takes longer than the conversion of a short tensor.
const bool kHasF16c = has_f16c();

PADDLE_ASGD_F16C_TARGET void widen_by_processor(const Float16* from, float* to, int64_t count) {
  int64_t e = 0;
#pragma GCC unroll 4
  for (; e + 8 <= count; e += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + e));
    _mm256_storeu_ps(to + e, _mm256_cvtph_ps(halves));
  }
  // The last elements, fewer than eight, get the same bits one by one.
  for (; e < count; ++e) to[e] = widen(from[e]);
}

PADDLE_ASGD_F16C_TARGET void narrow_by_processor(const float* from, Float16* to, int64_t count) {
  const __m256 sign = _mm256_set1_ps(-0.0f), quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
  int64_t e = 0;
#pragma GCC unroll 4
  for (; e + 8 <= count; e += 8) {
    const __m256 value = _mm256_loadu_ps(from + e);
    // The processor keeps the upper bits of a NaN, narrow_to_float16() its sign only.
    const __m256 nan = _mm256_or_ps(_mm256_and_ps(value, sign), quiet);
    const __m256 one_nan = _mm256_blendv_ps(value, nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + e), _mm256_cvtps_ph(one_nan, _MM_FROUND_TO_NEAREST_INT));
  }
  for (; e < count; ++e) narrow(from[e], &to[e]);
}

#undef PADDLE_ASGD_F16C_TARGET

#endif

// The choice stands outside of the loops, which are compiled for different instruction sets.
void widen_array(const Float16* from, float* to, int64_t count) {
#if PADDLE_ASGD_F16C
  if (kHasF16c) return widen_by_processor(from, to, count);
#endif
  widen_in_integers(from, to, count);
}

void narrow_array(const float* from, Float16* to, int64_t count) {
#if PADDLE_ASGD_F16C
  if (kHasF16c) return narrow_by_processor(from, to, count);
#endif
  narrow_in_integers(from, to, count);
}

}  // namespace
}  // namespace paddle_asgd
