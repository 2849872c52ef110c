// exp and tanh of vectors: at most 2 units in the last place, over all of fp32.

#pragma once

#include "vec.h"

namespace orpo::ORPO_ISA {

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2, where a polynomial of degree 6 is off by 3e-9.
// Of several vectors side by side: one alone is a chain of instructions that wait for each other.
template <int N>
ORPO_INLINE void exp_(Vec (&x)[N]) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: added, it rounds to a whole number, which are then the low bits
  Vec k[N], n[N], r[N], r2[N], p[N], q[N];
#define EACH for (int i = 0; i < N; ++i)
  EACH x[i] = max_of(splat(-105.0f), min_of(splat(89.0f), x[i]));  // beyond, the result is 0 or infinite
  EACH k[i] = x[i] * 1.44269504f + ROUND;
  EACH n[i] = k[i] - ROUND;
  EACH r[i] = x[i] - n[i] * 0.693359375f;  // ln 2 in two parts; n times the first, of 10 bits, is exact
  EACH r[i] = r[i] + n[i] * 2.12194440e-4f;
  EACH r2[i] = r[i] * r[i];
  EACH p[i] = r[i] * 8.36874544620514e-3f + 4.166838899254799e-2f;
  EACH q[i] = r[i] * 1.666652113199234e-1f + 4.999999403953552e-1f;
  EACH p[i] = r2[i] * 1.3814540579915047e-3f + p[i];
  EACH p[i] = p[i] * r2[i] + q[i];
  EACH p[i] = p[i] * r2[i] + r[i];  // exp(r) - 1
#if defined(__AVX512F__)
  EACH x[i] = (Vec)_mm512_scalef_ps((__m512)(p[i] + 1.0f), (__m512)n[i]);
#else
  // 2^n in two factors: one alone would not hold what leads to subnormal results or to the largest.
  // Shifted to the exponent's place, nothing is left of ROUND.
  constexpr uint32_t ONE = 0x3f800000u;
  Vec a[N], b[N];
  EACH a[i] = floats_of(((bits_of(k[i]) >> 1) << 23) + ONE);
  EACH b[i] = floats_of(((bits_of(k[i]) - (bits_of(k[i]) >> 1)) << 23) + ONE);
  EACH x[i] = (p[i] * a[i] + a[i]) * b[i];
#endif
#undef EACH
}

struct Tanh {
  Vec value;
  Vec slope;  // 1 - value^2, without its cancellation
};

// With e = exp(-2|x|) and q = 2e / (1 + e): tanh|x| = 1 - q, its slope q (2 - q). Far from 0, where q is small, that is
// exact to half a unit; near 0 the difference cancels, and Cephes' polynomial takes over.
ORPO_INLINE Tanh tanh_from(Vec x, Vec e) {
  const Vec q = 2.0f * e / (1.0f + e);
  const Vec far = floats_of(bits_of(1.0f - q) | (bits_of(x) & 0x80000000u));
  const Vec x2 = x * x;
  Vec p = x2 * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  return {x2 < 0.390625f ? x + x * x2 * p : far, q * (2.0f - q)};
}

template <int N>
ORPO_INLINE void tanh_(Vec (&x)[N], Vec (&slope)[N]) {
  Vec e[N];
  for (int i = 0; i < N; ++i) e[i] = magnitude(x[i]) * -2.0f;
  exp_(e);
  for (int i = 0; i < N; ++i) {
    const Tanh t = tanh_from(x[i], e[i]);
    x[i] = t.value;
    slope[i] = t.slope;
  }
}

}  // namespace orpo::ORPO_ISA
