// The statistics of a chunk of logits, which is only read: for evaluation, and for what recomputes the residual later.

#include "row.h"

namespace orpo::ORPO_ISA {

namespace {

template <bool CAPPED, class T>
void statistics_of_rows(const Logits& a, double* log_odds, double* lse_others, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const T* row = a.z.row<T>(i);
    Others others;
    for (int64_t start = 0; start < a.z.columns; start += BLOCK) {
      const int64_t count = least(a.z.columns - start, BLOCK);
      others.add<CAPPED>(row + start, count, a.target[i] - start, a.transform, nullptr);
    }
    lse_others[i] = others.lse();
    log_odds[i] = target_of<CAPPED>(row + a.target[i], a.transform).z - lse_others[i];
  }
}

}  // namespace

void statistics(const Logits& a, double* log_odds, double* lse_others, int64_t begin, int64_t end) {
  for_dtype(a.z.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = a.transform.softcap ? statistics_of_rows<true, T> : statistics_of_rows<false, T>;
    run(a, log_odds, lse_others, begin, end);
  });
}

}  // namespace orpo::ORPO_ISA
