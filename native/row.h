// A row of logits, block by block: what the statistics and the residual share.
//
// The sum of the others runs as an online softmax (Milakov and Gimelshein, arXiv 1805.02867), but by blocks: a block is
// taken relative to one logit, and the sum is rescaled only where a block has a much larger one. A block is summed in
// fp32, lane by lane, and the blocks in float64.

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

// The largest logit of a block of whole pairs without the target and without a cap.
template <class T>
ORPO_INLINE float largest_of(const T* row, int64_t count, float scale) {
  Pair top = {splat(LOWEST), splat(LOWEST)};
  for (int64_t i = 0; i < count; i += PAIR) {
    const Pair p = load_pair(row + i);
    for (int k = 0; k < 2; ++k) top.v[k] = max_of(p.v[k] * scale, top.v[k]);
  }
  return largest(max_of(top.v[0], top.v[1]));
}

// The transformed logits of any other block into `z`, as the pairs of T, with LOWEST for its target (if it is here) and
// -inf beyond its end. With a cap, and where they are wanted, its slopes go to `slopes`. Returns the largest.
template <bool CAPPED, class T>
ORPO_INLINE float load_block(const T* row, int64_t count, int64_t target, Transform t, float* z, float* slopes) {
  for (int64_t i = 0; i < count; i += PAIR) {
    Pair p = load_pair(row + i, count - i), slope;
    transform_<CAPPED>(p, slope, t);
    store_pair(z + i, p);
    if (CAPPED && slopes) store_pair(slopes + i, slope);
  }
  if (target >= 0 && target < count) z[place_in_pairs(row, target)] = LOWEST;
  for (int64_t i = count; i % PAIR != 0; ++i) z[place_in_pairs(row, i)] = -__builtin_inff();
  return largest_of(z, count, 1.0f);
}

struct Block {
  double sum;
  float top;  // the largest exponent
};

// exp(scale * z - reference) of a block of whole pairs, times `slopes` (unless null) into `out` (unless null). The sum is
// that without the slopes.
template <class T>
ORPO_INLINE Block exp_block(const T* z, int64_t count, float scale, float reference, const float* slopes, float* out) {
  Pair sum = {}, top = {splat(LOWEST), splat(LOWEST)};
  for (int64_t i = 0; i < count; i += PAIR) {
    Pair e = load_pair(z + i);
    for (int k = 0; k < 2; ++k) {
      e.v[k] = e.v[k] * scale - reference;
      top.v[k] = max_of(e.v[k], top.v[k]);
    }
    exp_(e.v);
    for (int k = 0; k < 2; ++k) {
      sum.v[k] += e.v[k];
      if (slopes) e.v[k] = e.v[k] * load(slopes + i + k * LANES);
    }
    if (out) store_pair(out + i, e);
  }
  return {sum_of(sum.v[0] + sum.v[1]), largest(max_of(top.v[0], top.v[1]))};
}

constexpr float SLACK = 40;  // exp(SLACK) is far from fp32's largest number, and so is a block's sum of it

// The running statistics of the others. The exponentials are taken relative to a logit that need not be the largest so
// far, only near it: most blocks are read once, and their largest logit comes out of the same pass as their sum.
struct Others {
  float reference = LOWEST;
  double total = 0;  // sum of exp(z_j - reference)

  // The next block of a row, whose exponentials go to `out` (unless null), relative to what is then `reference`. `out`
  // has room for whole pairs.
  template <bool CAPPED, class T>
  inline __attribute__((always_inline)) void add(const T* row, int64_t count, int64_t target, Transform t, float* out) {
    const bool is_here = target >= 0 && target < count;
    if (CAPPED || is_here || count % PAIR != 0) {
      alignas(64) float z[BLOCK], slopes[BLOCK];
      raise(load_block<CAPPED>(row, count, target, t, z, out ? slopes : nullptr));
      total += exp_block(z, count, 1.0f, reference, CAPPED && out ? slopes : nullptr, out).sum;
      return;
    }
    if (reference == LOWEST) raise(largest_of(row, count, t.scale));
    Block block = exp_block(row, count, t.scale, reference, nullptr, out);
    if (block.top > SLACK) {
      raise(largest_of(row, count, t.scale));
      block = exp_block(row, count, t.scale, reference, nullptr, out);
    }
    total += block.sum;
  }

  // Before a block whose largest logit is `top`.
  void raise(float top) {
    if (!(top > reference)) return;
    total *= ::exp(static_cast<double>(reference) - top);
    reference = top;
  }

  double lse() const { return reference + ::log(total); }
};

}  // namespace orpo::ORPO_ISA
