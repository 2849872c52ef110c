// fp32, bf16 and fp16 in memory, fp32 in registers. Every store rounds once, to nearest even; NaN stays NaN.

#pragma once

#include "dtypes.h"
#include "vec.h"

namespace orpo::ORPO_ISA {

ORPO_INLINE Vec load(const float* from) { return load_as<Vec>(from); }
ORPO_INLINE void store(float* to, Vec v) { store_as(to, v); }

ORPO_INLINE Vec load(const bf16* from) { return floats_of(widen(load_as<Half>(from)) << 16); }

// In the upper half; what is left in the lower one is of no use.
ORPO_INLINE Bits rounded_to_bf16(Bits x) { return x + (((x >> 16) & 1u) + 0x7fffu); }

ORPO_INLINE void store(bf16* to, Vec v) {
  const Bits quiet = bits_of(v) | 0x400000u;  // of a NaN, which rounding could carry into infinity and beyond
  store_as(to, narrow((v != v ? quiet : rounded_to_bf16(bits_of(v))) >> 16));
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

// The same where only `left` elements of the row are left: others are read as 0, and not written.
template <class T>
ORPO_INLINE Vec load(const T* from, int64_t left) {
  if (left >= LANES) return load(from);
  T last[LANES] = {};
  __builtin_memcpy(last, from, left * sizeof(T));
  return load(last);
}

template <class T>
ORPO_INLINE void store(T* to, Vec v, int64_t left) {
  if (left >= LANES) return store(to, v);
  T last[LANES];
  store(last, v);
  __builtin_memcpy(to, last, left * sizeof(T));
}

// Two vectors of a row, side by side. Those of bf16 have the even and the odd elements, which saves every shuffle.
struct Pair {
  Vec v[2];
};

constexpr int PAIR = 2 * LANES;

template <class T>
ORPO_INLINE Pair load_pair(const T* from) {
  return {load(from), load(from + LANES)};
}

template <class T>
ORPO_INLINE void store_pair(T* to, Pair p) {
  store(to, p.v[0]);
  store(to + LANES, p.v[1]);
}

ORPO_INLINE Pair load_pair(const bf16* from) {
  const Bits both = load_as<Bits>(from);
  return {floats_of(both << 16), floats_of(both & 0xffff0000u)};
}

// Results of arithmetic on bf16 alone: their NaNs have nothing in the lower half that rounding could carry, and a
// tenth of the time is saved by not asking.
ORPO_INLINE void store_pair(bf16* to, Pair p) {
  store_as(to, (rounded_to_bf16(bits_of(p.v[0])) >> 16) | (rounded_to_bf16(bits_of(p.v[1])) & 0xffff0000u));
}

// Where element i of a row is, once its pairs are stored as floats.
template <class T>
ORPO_INLINE int64_t place_in_pairs(const T*, int64_t i) {
  return i;
}

ORPO_INLINE int64_t place_in_pairs(const bf16*, int64_t i) { return i / PAIR * PAIR + i % 2 * LANES + i % PAIR / 2; }

template <class T>
ORPO_INLINE Pair load_pair(const T* from, int64_t left) {
  if (left >= PAIR) return load_pair(from);
  T last[PAIR] = {};
  __builtin_memcpy(last, from, left * sizeof(T));
  return load_pair(last);
}

template <class T>
ORPO_INLINE void store_pair(T* to, Pair p, int64_t left) {
  if (left >= PAIR) return store_pair(to, p);
  T last[PAIR];
  store_pair(last, p);
  __builtin_memcpy(to, last, left * sizeof(T));
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

}  // namespace orpo::ORPO_ISA
