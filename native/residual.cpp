// A chunk of logits becomes its softmax residual, in place; one read and one write of the chunk.
//
// Every logit is exponentiated once. The first pass leaves exp(z_j - reference) * slope_j in fp32, relative to the
// reference of its block; the second multiplies each block by exp(reference - lse_others) and rounds. (Exponentiating
// twice would need no row of fp32, but exp is what bounds this pass on a CPU, not memory.)

#include "row.h"

namespace orpo::ORPO_ISA {

namespace {

template <bool CAPPED, class T>
double residual_of_row(T* row, int64_t columns, int64_t target, Transform t, float* scratch) {
  const Target y = target_of<CAPPED>(row + target, t);
  float* references = scratch + (columns + BLOCK - 1) / BLOCK * BLOCK;
  Others others;
  for (int64_t start = 0, i = 0; start < columns; start += BLOCK, ++i) {
    const int64_t count = least(columns - start, BLOCK);
    others.add<CAPPED>(row + start, count, target - start, t, scratch + start);
    references[i] = others.reference;
  }

  for (int64_t start = 0, i = 0; start < columns; start += BLOCK, ++i) {
    const double factor = ::exp(static_cast<double>(references[i]) - others.reference) / others.total;
    const float share = static_cast<float>(factor);
    for (int64_t j = start; j < least(start + BLOCK, columns); j += PAIR) {
      Pair e = load_pair(scratch + j);
      for (Vec& v : e.v) v = v * share;
      store_pair(row + j, e, columns - j);
    }
  }
  store(row + target, splat(-y.slope), 1);
  return y.z - others.lse();
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
    const auto run = a.transform.softcap ? residual_of_rows<true, T> : residual_of_rows<false, T>;
    run(a, log_odds, begin, end, scratch);
  });
}

}  // namespace orpo::ORPO_ISA
