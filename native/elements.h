// fp32, bf16 and fp16 in memory, fp32 in registers. Every store rounds once, to nearest even; NaN stays NaN.

#pragma once

#include "dtypes.h"
#include "vec.h"

namespace orpo::ORPO_ISA {

ORPO_INLINE Vec load(const float* from) { return load_as<Vec>(from); }
ORPO_INLINE void store(float* to, Vec v) { store_as(to, v); }

ORPO_INLINE Vec load(const bf16* from) { return floats_of(widen(load_as<Half>(from)) << 16); }

ORPO_INLINE void store(bf16* to, Vec v) {
  const Bits bits = bits_of(v);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits nan = (bits >> 16) | 0x40u;  // which adding could carry into infinity, or round away
  store_as(to, narrow((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded));
}

#if defined(__AVX512F__)
ORPO_INLINE Vec load(const fp16* from) { return (Vec)_mm512_cvtph_ps((__m256i)load_as<Half>(from)); }
ORPO_INLINE void store(fp16* to, Vec v) { store_as(to, (Half)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__)
ORPO_INLINE Vec load(const fp16* from) { return (Vec)_mm256_cvtph_ps((__m128i)load_as<Half>(from)); }
ORPO_INLINE void store(fp16* to, Vec v) { store_as(to, (Half)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__aarch64__)
ORPO_INLINE Vec load(const fp16* from) { return (Vec)vcvt_f32_f16((float16x4_t)load_as<Half>(from)); }
ORPO_INLINE void store(fp16* to, Vec v) { store_as(to, (Half)vcvt_f16_f32((float32x4_t)v)); }
#else
// No instruction for it: exponents are moved as integers, and floating-point additions align subnormal numbers.
ORPO_INLINE Vec load(const fp16* from) {
  const Bits half = widen(load_as<Half>(from));
  const Bits shifted = (half & 0x7fffu) << 13;
  const Bits normal = shifted + (112u << 23);
  const Bits special = shifted + (224u << 23);  // infinity and NaN
  const Bits subnormal = bits_of(floats_of(shifted + (113u << 23)) - 0x1p-14f);
  const Bits exponent = half & 0x7c00u;
  const Bits value = exponent == 0u ? subnormal : (exponent == 0x7c00u ? special : normal);
  return floats_of(value | (half & 0x8000u) << 16);
}

ORPO_INLINE void store(fp16* to, Vec v) {
  const Bits sign = bits_of(v) & 0x80000000u;
  const Bits bits = bits_of(v) ^ sign;
  const Bits normal = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  const Bits subnormal = bits_of(floats_of(bits) + 0.5f) - 0x3f000000u;
  const Bits special = bits > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
  const Bits value = bits >= 0x47800000u ? special : (bits < 0x38800000u ? subnormal : normal);
  store_as(to, narrow(value | sign >> 16));
}
#endif

// The last `count` < LANES elements of a row; lanes beyond them are 0 and are not written.
template <class T>
ORPO_INLINE Vec load_some(const T* from, int64_t count) {
  T all[LANES] = {};
  __builtin_memcpy(all, from, count * sizeof(T));
  return load(all);
}

template <class T>
ORPO_INLINE void store_some(T* to, Vec v, int64_t count) {
  T all[LANES];
  store(all, v);
  __builtin_memcpy(to, all, count * sizeof(T));
}

// `f` with an element of that type.
template <class F>
ORPO_INLINE void for_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::fp32: return f(float{});
    case DType::bf16: return f(bf16{});
    case DType::fp16: return f(fp16{});
  }
}

// `to[i] = f(from[i])` for i < count, a vector at a time; f takes the vector and the index of its first element.
template <class From, class To, class F>
ORPO_INLINE void map(const From* from, To* to, int64_t count, F f) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, f(load(from + i), i));
  if (i < count) store_some(to + i, f(load_some(from + i, count - i), i), count - i);
}

}  // namespace orpo::ORPO_ISA
