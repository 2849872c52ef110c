// Rows to the length-normalised log-probability of each sequence, and its share of the NLL: one walk over the rows in
// their order, in float64. A few numbers a row are nothing beside a vocabulary: one thread, one instruction set.

#include "sequence_sums.h"

#include "log_sigmoid.h"

namespace orpo {

void sequence_sums(const SequenceSums& a) {
  for (int64_t i = 0; i < a.sequences; ++i) a.mean_logps[i] = a.scored_rows[i] = a.nll[i] = 0;
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t i = a.sequence[r];
    const double logp = log_sigmoid(a.log_odds[r]);
    if (a.scored[r]) {
      a.mean_logps[i] += logp;
      a.scored_rows[i] += 1;
    }
    if (a.nll_weight[r] != 0) a.nll[i] -= a.nll_weight[r] * logp;  // weight 0 wins over an infinite logp
  }
  for (int64_t i = 0; i < a.sequences; ++i) a.mean_logps[i] /= a.scored_rows[i] > 1 ? a.scored_rows[i] : 1.0;
}

}  // namespace orpo
