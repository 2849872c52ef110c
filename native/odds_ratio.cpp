// Sequences to the loss of their pairs, and the gradient of every row, in float64: the formulas of
// `orpo_kernels/engine/objective.py`. One walk over the pairs, one over the rows: one thread, one instruction set.

#include "odds_ratio.h"

#include <cfloat>
#include <cmath>
#include <memory>

#include "log_sigmoid.h"

namespace orpo {

static double reciprocal(double count) { return count > 0 ? 1 / count : 0; }

void odds_ratio(const OddsRatio& a) {
  const double nll_share = reciprocal(a.nll_count), pair_share = reciprocal(a.pair_count);
  const std::unique_ptr<double[]> share(new double[2 * a.pairs]), log_share(new double[2 * a.pairs]);
  double *chosen = a.numbers + 3, *rejected = chosen + a.pairs, *log_odds = rejected + a.pairs;
  double nll_sum = 0, or_loss = 0;
  for (int64_t i = 0; i < a.pairs; ++i) {
    const int64_t j = a.pairs + i;
    chosen[i] = a.mean_logps[i];
    rejected[i] = a.mean_logps[j];
    nll_sum += a.nll[i] + a.nll[j];
    a.valid[i] = a.scored_rows[i] > 0 && a.scored_rows[j] > 0;
    // A log-probability that rounds to 0 would have infinite log-odds.
    const double a_chosen = a.valid[i] ? std::fmin(chosen[i], -DBL_MIN) : -1;
    const double a_rejected = a.valid[i] ? std::fmin(rejected[i], -DBL_MIN) : -1;
    const double log1mexp_chosen = std::log(-std::expm1(a_chosen));
    const double log1mexp_rejected = std::log(-std::expm1(a_rejected));
    const double d = (a_chosen - log1mexp_chosen) - (a_rejected - log1mexp_rejected);
    const double weight = a.valid[i] ? pair_share * (a.pair_weight ? a.pair_weight[i] : 1) : 0;
    log_odds[i] = d;
    if (weight != 0) or_loss -= weight * log_sigmoid(d);  // weight 0 wins over an infinite d
    // d OR / d a without the 1 / (1 - exp(a)), which joins sigmoid(-m) below
    share[i] = -weight / std::fmax(a.scored_rows[i], 1);
    share[j] = weight / std::fmax(a.scored_rows[j], 1);
    log_share[i] = log_sigmoid(-d) - log1mexp_chosen;
    log_share[j] = log_sigmoid(-d) - log1mexp_rejected;
  }
  for (int64_t r = 0; r < a.rows; ++r) {
    const int64_t s = a.sequence[r];
    const double log_token = log_sigmoid(-a.log_odds[r]);
    const bool counts = a.scored[r] && share[s] != 0;
    const double or_grad = counts ? share[s] * std::exp(log_share[s] + log_token) : 0;
    a.grad[r] = a.beta * or_grad - a.alpha * nll_share * a.nll_weight[r] * std::exp(log_token);
  }
  a.numbers[1] = nll_sum * nll_share;
  a.numbers[2] = or_loss;
  a.numbers[0] = a.alpha * a.numbers[1] + a.beta * or_loss;
}

}  // namespace orpo
