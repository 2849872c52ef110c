#pragma once

#include <cstdint>

namespace orpo {

struct OddsRatio {
  // of rows
  const double* log_odds;
  const int64_t* sequence;
  const bool* scored;
  const double* nll_weight;  // its pair's weight included
  int64_t rows;
  // of sequences: what `sequence_sums` gave
  const double* mean_logps;
  const double* scored_rows;
  const double* nll;
  // of pairs
  const double* pair_weight;  // or null
  int64_t pairs;
  double alpha, beta;
  double nll_count, pair_count;  // what the means are divided by
  // out
  double* numbers;  // (3 + 3B) loss, NLL, OR; chosen and rejected log-probabilities, log-odds
  bool* valid;      // (B)
  double* grad;     // (R)
};

void odds_ratio(const OddsRatio&);

}  // namespace orpo
