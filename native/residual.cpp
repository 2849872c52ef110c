// A chunk of logits becomes its softmax residual, in place; one read and one write of the chunk.
//
// Every logit is exponentiated once. The first pass leaves exp(z_j - reference) * slope_j in fp32, relative to the
// largest logit that was known at its block; the second multiplies each block by exp(reference - lse_others) and rounds.

#include "row.h"

namespace orpo::ORPO_ISA {

namespace {

template <bool CAPPED, class T>
double residual_of_row(T* row, int64_t columns, int64_t target, Transform t, float* scratch) {
  const Vec target_value = load_some(row + target, 1);
  const float z_target = transformed<CAPPED>(target_value, t)[0];
  float* references = scratch + (columns + BLOCK - 1) / BLOCK * BLOCK;
  alignas(64) float z[BLOCK], slope[BLOCK];

  Others others;
  for (int64_t start = 0, block = 0; start < columns; start += BLOCK, ++block) {
    const int64_t count = least(columns - start, BLOCK);
    others.raise(load_block<CAPPED>(row + start, count, target - start, t, z, slope));
    others.total += sum_block(z, count, others.reference, [&](Vec e, int64_t i) {
      store(scratch + start + i, CAPPED ? e * load(slope + i) : e);
    });
    references[block] = others.reference;
  }

  for (int64_t start = 0, block = 0; start < columns; start += BLOCK, ++block) {
    const double factor = ::exp(static_cast<double>(references[block]) - others.reference) / others.total;
    const float share = static_cast<float>(factor);
    map(scratch + start, row + start, least(columns - start, BLOCK), [&](Vec e, int64_t) { return e * share; });
  }
  store_some(row + target, -slope_of<CAPPED>(target_value, t), 1);
  return z_target - others.lse();
}

template <bool CAPPED, class T>
void residual_of_rows(const Logits& a, double* log_odds, int64_t begin, int64_t end, float* scratch) {
  for (int64_t i = begin; i < end; ++i)
    log_odds[i] = residual_of_row<CAPPED>(a.z.row<T>(i), a.z.columns, a.target[i], a.transform, scratch);
}

}  // namespace

void residual(const Logits& a, double* log_odds, int64_t begin, int64_t end, float* scratch) {
  for_dtype(a.z.dtype, [&](auto element) {
    using T = decltype(element);
    (a.transform.softcap ? residual_of_rows<true, T> : residual_of_rows<false, T>)(a, log_odds, begin, end, scratch);
  });
}

}  // namespace orpo::ORPO_ISA
