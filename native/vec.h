// A vector of floats as wide as the instruction set that this file is compiled for, by GCC's and Clang's vector types.
//
// The sources of the kernels are compiled once for each instruction set, in a namespace of its own (ORPO_ISA), and all
// helpers have internal linkage: no code of one set can end up in another's path. For the same reason the kernels take
// nothing from the C++ library that is not a constant.

#pragma once

#include <cstdint>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ORPO_INLINE static inline __attribute__((always_inline))

namespace orpo::ORPO_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Int __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Half __attribute__((vector_size(2 * LANES)));
typedef double Wide __attribute__((vector_size(8 * LANES)));

ORPO_INLINE Vec splat(float x) { return Vec{} + x; }
ORPO_INLINE Bits bits_of(Vec x) { return (Bits)x; }
ORPO_INLINE Vec floats_of(Bits x) { return (Vec)x; }

// Of a number and a NaN, both give the second: a bound comes first, so that NaN stays NaN.
// (x86's instructions do just that, but GCC makes a comparison and a blend of it.)
ORPO_INLINE Vec max_of(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

ORPO_INLINE Vec min_of(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

ORPO_INLINE Vec magnitude(Vec x) { return floats_of(bits_of(x) & 0x7fffffffu); }

template <class V, class T>
ORPO_INLINE V load_as(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
ORPO_INLINE void store_as(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// 16-bit lanes to 32 and back. Spelled out where GCC makes two instructions and a shuffle of one.
ORPO_INLINE Bits widen(Half x) {
#if defined(__AVX512F__)
  return (Bits)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (Bits)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, Bits);
#endif
}

ORPO_INLINE Half narrow(Bits x) {  // of numbers below 2^16
#if defined(__AVX512F__)
  return (Half)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // within each half of the register
  return (Half)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(x, Half);
#endif
}

ORPO_INLINE float largest(Vec v) {  // by halves: one after the other they would wait for each other
  float x[LANES];
  store_as(x, v);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] = x[i] > x[i + width] ? x[i] : x[i + width];
  return x[0];
}

ORPO_INLINE double sum_of(Vec v) {
  Wide x = __builtin_convertvector(v, Wide);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

}  // namespace orpo::ORPO_ISA
