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

ORPO_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Scales and caps the logits; with a cap, its slopes go to `slope`.
template <bool CAPPED>
ORPO_INLINE void transform_(Pair& z, Pair& slope, Transform t) {
  for (Vec& v : z.v) v = v * t.scale;
  if (!CAPPED) return;
  for (Vec& v : z.v) v = v / t.softcap;
  tanh_(z.v, slope.v);
  for (Vec& v : z.v) v = v * t.softcap;
}

struct Target {
  float z, slope;
};

// The transformed logit of one token.
template <bool CAPPED, class T>
ORPO_INLINE Target target_of(const T* logit, Transform t) {
  Pair z = {load(logit, 1)}, slope = {splat(1.0f)};
  transform_<CAPPED>(z, slope, t);
  return {z.v[0][0], slope.v[0][0]};
}

constexpr float LOWEST = -3.4028234663852886e38f;  // the logit of the target among the others: out of the question

// The transformed logits of a block into `z`, as the pairs of T, with LOWEST for its target (if it is here) and -inf
// beyond its end. With a cap, and where they are wanted, its slopes go to `slopes`. Returns the largest.
template <bool CAPPED, class T>
ORPO_INLINE float load_block(const T* row, int64_t count, int64_t target, Transform t, float* z, float* slopes) {
  const bool is_here = target >= 0 && target < count;
  Pair top = {splat(LOWEST), splat(LOWEST)};
  for (int64_t i = 0; i < count; i += PAIR) {
    Pair p = load_pair(row + i, count - i), slope;
    transform_<CAPPED>(p, slope, t);
    for (int k = 0; k < 2; ++k) top.v[k] = max_of(p.v[k], top.v[k]);
    store_pair(z + i, p);
    if (CAPPED && slopes) store_pair(slopes + i, slope);
  }
  if (is_here || count % PAIR != 0) {  // a few blocks of a row
    if (is_here) z[place_in_pairs(row, target)] = LOWEST;
    for (int64_t i = count; i % PAIR != 0; ++i) z[place_in_pairs(row, i)] = -__builtin_inff();
    top = {splat(LOWEST), splat(LOWEST)};
    for (int64_t i = 0; i < count; i += PAIR)
      for (int k = 0; k < 2; ++k) top.v[k] = max_of(load(z + i + k * LANES), top.v[k]);
  }
  return largest(max_of(top.v[0], top.v[1]));
}

// exp(z - reference) of a block as `load_block` left it, times `slopes` (unless null) into `out` (unless null).
// Returns the sum, without the slopes.
ORPO_INLINE double exp_block(const float* z, int64_t count, float reference, const float* slopes, float* out) {
  Pair sum = {};
  for (int64_t i = 0; i < count; i += PAIR) {
    Pair e = load_pair(z + i);
    for (Vec& v : e.v) v = v - reference;
    exp_(e.v);
    for (int k = 0; k < 2; ++k) {
      sum.v[k] += e.v[k];
      if (slopes) e.v[k] = e.v[k] * load(slopes + i + k * LANES);
    }
    if (out) store_pair(out + i, e);
  }
  return sum_of(sum.v[0] + sum.v[1]);
}

// The running statistics of the others.
struct Others {
  float reference = LOWEST;
  double total = 0;  // sum of exp(z_j - reference)

  // Before a block whose largest logit is `top`.
  void raise(float top) {
    if (!(top > reference)) return;
    total *= ::exp(static_cast<double>(reference) - top);
    reference = top;
  }

  double lse() const { return reference + ::log(total); }
};

}  // namespace orpo::ORPO_ISA
