// A row of logits, block by block: what the statistics and the residual share.
//
// The sum of the others runs as an online softmax (Milakov and Gimelshein, arXiv 1805.02867), but by blocks: a block is
// taken relative to the largest logit so far, and the sum is rescaled only where a block has a larger one. A block is
// summed in fp32, lane by lane, and the blocks in float64.

#pragma once

#include <cmath>

#include "elements.h"
#include "kernels.h"
#include "vec_math.h"

namespace orpo::ORPO_ISA {

constexpr float LOWEST = -3.4028234663852886e38f;  // the logit of the target among the others: out of the question

// Scaled and capped logits of a vector.
template <bool CAPPED>
ORPO_INLINE Vec transformed(Vec z, Transform t) {
  z = z * t.scale;
  return CAPPED ? tanh_of(z / t.softcap).value * t.softcap : z;
}

template <bool CAPPED>
ORPO_INLINE Vec slope_of(Vec z, Transform t) {
  return CAPPED ? tanh_of(z * t.scale / t.softcap).slope : splat(1.0f);
}

// The running statistics of the others.
struct Others {
  float reference = LOWEST;
  double total = 0;  // sum of exp(z_j - reference)

  // Before a block whose largest logit is `top`: nothing so far was relative to less than the reference.
  void raise(float top) {
    if (!(top > reference)) return;
    total *= ::exp(static_cast<double>(reference) - top);
    reference = top;
  }

  double lse() const { return reference + ::log(total); }
};

// The transformed logits of a block into `z`, filled up with -inf, and its target (if it is here) with LOWEST.
// Where `slope` is wanted, the soft-cap's slopes go there. Returns the largest.
template <bool CAPPED, class T>
ORPO_INLINE float load_block(const T* row, int64_t count, int64_t target, Transform t, float* z, float* slope) {
  map(row, z, count, [&](Vec v, int64_t i) {
    if (!CAPPED) return v * t.scale;
    const Tanh capped = tanh_of(v * t.scale / t.softcap);
    if (slope) store_as(slope + i, capped.slope);
    return capped.value * t.softcap;
  });
  for (int64_t i = count; i % (4 * LANES) != 0; ++i) z[i] = -__builtin_inff();
  if (target >= 0 && target < count) z[target] = LOWEST;
  Vec tops[4] = {splat(LOWEST), splat(LOWEST), splat(LOWEST), splat(LOWEST)};
  for (int64_t i = 0; i < count; i += 4 * LANES)
    for (int k = 0; k < 4; ++k) tops[k] = max_of(tops[k], load(z + i + k * LANES));
  return largest(max_of(max_of(tops[0], tops[1]), max_of(tops[2], tops[3])));
}

// Sum of e = exp(z - reference) over a block as `load_block` left it; `use(e, i)` sees every vector.
template <class Use>
ORPO_INLINE double sum_block(const float* z, int64_t count, float reference, Use use) {
  Vec sums[2] = {};
  for (int64_t i = 0; i < count; i += 2 * LANES) {
    for (int k = 0; k < 2; ++k) {
      const Vec e = exp_of(load(z + i + k * LANES) - reference);
      use(e, i + k * LANES);
      sums[k] += e;
    }
  }
  return sum_of(sums[0] + sums[1]);
}

ORPO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace orpo::ORPO_ISA
