// exp and tanh of vectors: at most 2 and 4 units in the last place, over all of fp32.

#pragma once

#include "vec.h"

namespace orpo::ORPO_ISA {

// exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2, where a polynomial of degree 6 is off by 3e-9.
ORPO_INLINE Vec exp_of(Vec x) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: added, it rounds to a whole number, which are then the low bits
  x = max_of(splat(-105.0f), min_of(splat(89.0f), x));  // beyond, the result is 0 or infinite
  const Vec k = x * 1.44269504f + ROUND;
  const Vec n = k - ROUND;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; the first has 10 bits: n times it is exact
  Vec p = r * 1.3814540579915047e-3f + 8.36874544620514e-3f;
  p = p * r + 4.166838899254799e-2f;
  p = p * r + 1.666652113199234e-1f;
  p = p * r + 4.999999403953552e-1f;
  p = (p * r) * r + r + 1.0f;
  // 2^n in two factors: one alone would not hold what leads to subnormal results or to the largest.
  const Int whole = (Int)(bits_of(k) - 0x4b400000u);
  const Int half = whole >> 1;
  const Vec a = floats_of((Bits)(half + 127) << 23);
  const Vec b = floats_of((Bits)(whole - half + 127) << 23);
  return p * a * b;
}

struct Tanh {
  Vec value;
  Vec slope;  // 1 - value^2, without its cancellation
};

// With e = exp(-2|x|): tanh|x| = (1 - e) / (1 + e), slope 4e / (1 + e)^2. Near 0 the first cancels: Cephes' polynomial.
ORPO_INLINE Tanh tanh_of(Vec x) {
  const Vec e = exp_of(magnitude(x) * -2.0f);
  const Vec above = 1.0f + e;
  const Vec ratio = (1.0f - e) / above;
  const Vec signed_ratio = floats_of(bits_of(ratio) | (bits_of(x) & 0x80000000u));
  const Vec x2 = x * x;
  Vec p = x2 * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * x2 - 5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 - 3.33332819422e-1f;
  return {x2 < 0.390625f ? x + x * x2 * p : signed_ratio, (4.0f * e) / (above * above)};
}

}  // namespace orpo::ORPO_ISA
