// Labels to rows: one walk over the labels, in the order of `orpo_kernels/rows.py`.

#include "label_rows.h"

#include <algorithm>
#include <memory>

namespace orpo {

FoundRows label_rows(const Labels& a, const LabelRows& out) {
  int64_t r = 0;
  bool unique_positions = true;
  const std::unique_ptr<int64_t[]> nll_rows(new int64_t[2 * a.pairs]());
  const auto add = [&](int64_t s, int64_t t, int64_t target, bool scored, bool in_nll) {
    out.position[r] = s * a.length + t;
    out.target[r] = target;
    out.sequence[r] = s;
    out.scored[r] = scored;
    out.nll_weight[r] = in_nll;
    nll_rows[s] += in_nll;
    ++r;
  };
  const int64_t targets = std::max<int64_t>(0, a.length - a.shift);
  const auto nll_label = [&](int64_t s, int64_t t) {
    if (s >= a.pairs) return a.ignore_index;
    return a.nll_labels ? a.nll_labels[s * a.nll_stride + t + a.shift] : a.labels[s * a.stride + t + a.shift];
  };
  // Of every sequence the rows of its labels, with the NLL of the same target; then NLL rows with a target of their own.
  out.offsets[0] = 0;
  for (int64_t s = 0; s < 2 * a.pairs; ++s) {
    for (int64_t t = 0; t < targets; ++t) {
      const int64_t label = a.labels[s * a.stride + t + a.shift], nll = nll_label(s, t);
      if (label != a.ignore_index)
        add(s, t, label, true, nll == label);
      else if (nll != a.ignore_index)
        add(s, t, nll, false, true);
    }
    for (int64_t t = 0; a.nll_labels && s < a.pairs && t < targets; ++t) {
      const int64_t label = a.labels[s * a.stride + t + a.shift], nll = nll_label(s, t);
      if (nll == a.ignore_index || label == a.ignore_index || nll == label) continue;
      add(s, t, nll, false, true);
      unique_positions = false;
    }
    out.offsets[s + 1] = r;
  }
  for (int64_t i = 0; a.per_sequence && i < r; ++i)
    out.nll_weight[i] /= std::max<int64_t>(1, nll_rows[out.sequence[i]]);
  return {r, unique_positions};
}

Counts count_rows(const int64_t* sequence, const bool* scored, const double* nll_weight, int64_t rows, int64_t pairs) {
  Counts counts{0, 0};
  const std::unique_ptr<bool[]> has_rows(new bool[2 * pairs]());
  for (int64_t r = 0; r < rows; ++r) {
    counts.nll += nll_weight[r];
    has_rows[sequence[r]] = has_rows[sequence[r]] || scored[r];
  }
  for (int64_t i = 0; i < pairs; ++i) counts.pairs += has_rows[i] && has_rows[pairs + i];
  return counts;
}

}  // namespace orpo
