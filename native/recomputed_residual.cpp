// Some columns of the residual, from their logits and the statistics of the whole rows; in place.

#include "row.h"

namespace orpo::ORPO_ISA {

namespace {

template <bool CAPPED, class T>
void recomputed_rows(const Logits& a, const double* lse_others, int64_t begin, int64_t end) {
  const Transform t = a.transform;
  for (int64_t i = begin; i < end; ++i) {
    T* row = a.z.row<T>(i);
    const int64_t target = a.target[i];
    const bool is_here = target >= 0 && target < a.z.columns;
    const Vec target_value = is_here ? load_some(row + target, 1) : Vec{};
    // In two parts: an lse_others of 1000 that is rounded to fp32 is off by 3e-5, and so would be every entry.
    const float high = static_cast<float>(lse_others[i]);
    const float low = static_cast<float>(lse_others[i] - high);
    map(row, row, a.z.columns, [&](Vec v, int64_t) {
      if (!CAPPED) return exp_of(v * t.scale - high - low);
      const Tanh capped = tanh_of(v * t.scale / t.softcap);
      return exp_of(capped.value * t.softcap - high - low) * capped.slope;
    });
    if (is_here) store_some(row + target, -slope_of<CAPPED>(target_value, t), 1);
  }
}

}  // namespace

void recomputed_residual(const Logits& a, const double* lse_others, int64_t begin, int64_t end) {
  for_dtype(a.z.dtype, [&](auto element) {
    using T = decltype(element);
    (a.transform.softcap ? recomputed_rows<true, T> : recomputed_rows<false, T>)(a, lse_others, begin, end);
  });
}

}  // namespace orpo::ORPO_ISA
