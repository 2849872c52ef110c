#pragma once

#include <cstdint>

namespace orpo {

struct SequenceSums {
  // of rows
  const double* log_odds;
  const int64_t* sequence;
  const bool* scored;
  const double* nll_weight;
  int64_t rows;
  // of sequences, out
  double* mean_logps;
  double* scored_rows;
  double* nll;
  int64_t sequences;
};

void sequence_sums(const SequenceSums&);

}  // namespace orpo
