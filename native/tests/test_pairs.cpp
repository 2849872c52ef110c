// label_rows, count_rows and odds_ratio against plain loops and the textbook formulas.

#include <cmath>
#include <vector>

#include "../label_rows.h"
#include "../odds_ratio.h"
#include "../sequence_sums.h"
#include "check.h"

using namespace orpo;
using namespace orpo::test;

void check_label_rows() {
  const int64_t no = -100;
  const std::vector<int64_t> labels{no, 1, 2, /**/ no, no, 3};   // one pair: chosen, rejected
  const std::vector<int64_t> nll_labels{4, 1, 5};                // one target of its own, one the same, one other
  std::vector<int64_t> position(9, -1), target(9, -1), sequence(9, -1);
  bool scored[9];
  std::vector<double> weight(9, NAN);
  std::vector<int64_t> offsets(3, -1);
  const LabelRows out{position.data(), target.data(), sequence.data(), scored, weight.data(), offsets.data()};
  const auto rows = [&](const int64_t* nll, bool shift, bool per_sequence) {
    const FoundRows found = label_rows({labels.data(), nll, 3, 3, 1, 3, shift, no, per_sequence}, out);
    CHECK(found.unique_positions == !nll, "rows");
    return found.count;
  };
  CHECK(rows(nullptr, false, false) == 3, "rows");
  CHECK(position[0] == 1 && target[0] == 1 && sequence[0] == 0 && scored[0] && weight[0] == 1, "rows");
  CHECK(position[2] == 5 && target[2] == 3 && sequence[2] == 1 && scored[2] && weight[2] == 0, "rows");
  CHECK(offsets[0] == 0 && offsets[1] == 2 && offsets[2] == 3, "rows");
  CHECK(rows(nullptr, true, false) == 3, "rows");
  CHECK(position[0] == 0 && position[1] == 1 && position[2] == 4, "rows");
  CHECK(rows(nll_labels.data(), false, true) == 5, "rows");
  CHECK(position[0] == 0 && target[0] == 4 && !scored[0] && weight[0] == 1.0 / 3, "rows");  // no label there: the NLL's alone
  CHECK(position[1] == 1 && target[1] == 1 && scored[1] && weight[1] == 1.0 / 3, "rows");
  CHECK(position[2] == 2 && target[2] == 2 && scored[2] && weight[2] == 0, "rows");
  CHECK(position[3] == 2 && target[3] == 5 && !scored[3] && weight[3] == 1.0 / 3, "rows");  // another target: a row more
  CHECK(sequence[3] == 0 && position[4] == 5 && sequence[4] == 1 && scored[4], "rows");      // the next sequence
  CHECK(offsets[0] == 0 && offsets[1] == 4 && offsets[2] == 5, "rows");
  const Counts counts = count_rows(sequence.data(), scored, weight.data(), 5, 1);
  CHECK(std::fabs(counts.nll - 1) < 1e-15 && counts.pairs == 1, counts.nll, counts.pairs);
  CHECK(count_rows(sequence.data(), scored, weight.data(), 3, 1).pairs == 0, "rows");
}

void check_odds_ratio(const double* pair_weight, double confidence) {
  // Two pairs; the second has no rejected row and counts for nothing but its NLL.
  const std::vector<double> m{0.5, confidence, -1, 2};
  const std::vector<int64_t> sequence{0, 0, 2, 1};
  const bool is_scored[] = {true, true, true, true};
  const std::vector<double> weight{1, 0.5, 0, 2};
  std::vector<double> mean(4), count(4), nll(4), numbers(9, NAN), grad(4, NAN);
  bool valid[2];
  sequence_sums({m.data(), sequence.data(), is_scored, weight.data(), 4, mean.data(), count.data(), nll.data(), 4});
  odds_ratio({m.data(), sequence.data(), is_scored, weight.data(), 4, mean.data(), count.data(), nll.data(),
              pair_weight, 2, 0.7, 0.3, 3.5, 1, numbers.data(), valid, grad.data()});
  CHECK(valid[0] && !valid[1], valid[0], valid[1]);
  const auto zeta = [](double a) { return a - std::log(-std::expm1(a)); };
  const double d = zeta(mean[0]) - zeta(mean[2]), w = pair_weight ? pair_weight[0] : 1;
  CHECK(std::fabs(numbers[7] - d) < 1e-12, numbers[7], d);
  CHECK(std::fabs(numbers[2] - w * std::log1p(std::exp(-d))) < 1e-12, numbers[2]);
  CHECK(std::fabs(numbers[1] - (nll[0] + nll[1]) / 3.5) < 1e-12, numbers[1]);
  CHECK(std::fabs(numbers[0] - 0.7 * numbers[1] - 0.3 * numbers[2]) < 1e-12, numbers[0]);
  const auto sigmoid = [](double x) { return 1 / (1 + std::exp(-x)); };
  const double share = w * sigmoid(-d);
  const double chosen = -0.3 * share * sigmoid(-m[0]) / -std::expm1(mean[0]) / 2 - 0.7 * sigmoid(-m[0]) / 3.5;
  CHECK(std::fabs(grad[0] - chosen) < 1e-12, grad[0], chosen);
  CHECK(std::fabs(grad[2] - 0.3 * share * sigmoid(-m[2]) / -std::expm1(mean[2])) < 1e-12, grad[2]);
  CHECK(std::fabs(grad[3] + 0.7 * 2 * sigmoid(-m[3]) / 3.5) < 1e-12, grad[3]);
  for (const double g : grad) CHECK(std::isfinite(g), g);
}

int main() {
  check_label_rows();
  const double weights[] = {0.25, 3};
  for (const double confidence : {0.0, 5.0, 30.0}) {
    check_odds_ratio(nullptr, confidence);
    check_odds_ratio(weights, confidence);
  }
  return report();
}
