// Some columns of the residual, from their logits and the statistics of the whole rows; in place.

#include "row.h"

namespace orpo::ORPO_ISA {

namespace {

template <bool CAPPED, class T>
void recomputed_rows(const Logits& a, const double* lse_others, int64_t begin, int64_t end) {
  const Transform t = a.transform;
  for (int64_t r = begin; r < end; ++r) {
    T* row = a.z.row<T>(r);
    const int64_t target = a.target[r];
    const bool is_here = target >= 0 && target < a.z.columns;
    const Target y = is_here ? target_of<CAPPED>(row + target, t) : Target{};
    // In two parts: an lse_others of 1000 that is rounded to fp32 is off by 3e-5, and so would be every entry.
    const float high = static_cast<float>(lse_others[r]);
    const float low = static_cast<float>(lse_others[r] - high);
    for (int64_t i = 0; i < a.z.columns; i += PAIR) {
      Pair p = load_pair(row + i, a.z.columns - i), slope;
      transform_<CAPPED>(p, slope, t);
      for (Vec& v : p.v) v = v - high - low;
      exp_(p.v);
      if (CAPPED)
        for (int k = 0; k < 2; ++k) p.v[k] = p.v[k] * slope.v[k];
      store_pair(row + i, p, a.z.columns - i);
    }
    if (is_here) store(row + target, splat(-y.slope), 1);
  }
}

}  // namespace

void recomputed_residual(const Logits& a, const double* lse_others, int64_t begin, int64_t end) {
  for_dtype(a.z.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = a.transform.softcap ? recomputed_rows<true, T> : recomputed_rows<false, T>;
    run(a, lse_others, begin, end);
  });
}

}  // namespace orpo::ORPO_ISA
