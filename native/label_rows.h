#pragma once

#include <cstdint>

namespace orpo {

// A padded batch: the B chosen sequences first, then the rejected ones.
struct Labels {
  const int64_t* labels;      // (2B, T), rows `stride` apart
  const int64_t* nll_labels;  // (B, T) or null: those of the chosen sequences
  int64_t stride, nll_stride;
  int64_t pairs, length;
  bool shift;  // whether labels[:, t + 1] is the target of position t
  int64_t ignore_index;
  bool per_sequence;  // whether the NLL is the mean over each sequence first
};

struct LabelRows {
  int64_t *position, *target, *sequence;
  bool* scored;
  double* nll_weight;
  int64_t* offsets;  // (2B + 1,): the rows of sequence s are [offsets[s], offsets[s + 1])
};

// How many rows there are, and whether no position occurs twice.
struct FoundRows {
  int64_t count;
  bool unique_positions;
};

// Writes the rows that count for something: at most 2BT, and BT more with labels of the NLL.
FoundRows label_rows(const Labels&, const LabelRows&);

// {the sum of the rows' NLL weights, the number of pairs of which both answers have a scored row}
struct Counts {
  double nll, pairs;
};
Counts count_rows(const int64_t* sequence, const bool* scored, const double* nll_weight, int64_t rows, int64_t pairs);

}  // namespace orpo
