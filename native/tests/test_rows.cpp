// Residual, statistics and recomputed residual of rows of any length at any address, against float64.

#include "../dispatch.h"
#include "check.h"
#include "numbers.h"

using namespace orpo;
using namespace orpo::test;

constexpr double LOWEST = -3.4028234663852886e38;

struct Truth {
  double log_odds, lse_others;
  std::vector<double> residual;
};

Truth truth_of(Guarded& logits, int64_t row, int64_t columns, int64_t target, Transform t) {
  std::vector<double> z(columns), slope(columns, 1.0);
  for (int64_t j = 0; j < columns; ++j) {
    z[j] = logits.get(row, j) * t.scale;
    if (t.softcap == 0) continue;
    const double cosh = std::cosh(z[j] / t.softcap);
    z[j] = t.softcap * std::tanh(z[j] / t.softcap);
    slope[j] = 1 / cosh / cosh;
  }
  const double z_target = z[target];
  z[target] = LOWEST;
  double top = LOWEST, total = 0;
  for (const double x : z) top = std::max(top, x);
  for (const double x : z) total += std::exp(x - top);
  Truth truth{0, top + std::log(total), z};
  truth.log_odds = z_target - truth.lse_others;
  for (int64_t j = 0; j < columns; ++j) truth.residual[j] = std::exp(z[j] - top) / total * slope[j];
  truth.residual[target] = -slope[target];
  return truth;
}

void check(const Kernels& kernels, const Format& format, int64_t columns, Transform t, double shift) {
  std::mt19937 random(static_cast<unsigned>(columns));
  const int64_t rows = 3;
  Guarded logits(rows, columns, format.dtype);
  logits.fill(random, 4);
  if (shift != 0) {
    for (int64_t j = 0; j < columns; ++j) logits.set(0, j, j % 5 == 1 ? -HUGE_VAL : shift - j % 7);
    // Every block far above the one before: the reference has to follow.
    for (int64_t j = 0; j < columns; ++j) logits.set(1, j, 100 * (j / BLOCK) - j % 7);
  }
  std::vector<int64_t> target{0, columns - 1, columns / 2};
  std::vector<Truth> truth;
  for (int64_t i = 0; i < rows; ++i) truth.push_back(truth_of(logits, i, columns, target[i], t));

  Guarded copy = logits, other = logits;
  std::vector<double> m(rows), m_again(rows), lse(rows);
  std::vector<float> scratch(scratch_floats(columns));
  kernels.statistics({logits.matrix(), target.data(), t}, m.data(), lse.data(), 0, rows);
  kernels.residual({copy.matrix(), target.data(), t}, m_again.data(), 0, rows, scratch.data());
  kernels.recomputed_residual({other.matrix(), target.data(), t}, lse.data(), 0, rows);

  for (int64_t i = 0; i < rows; ++i) {
    const Truth& true_row = truth[i];
    // What rounding z itself to fp32 costs comes with every logit, capped ones most of all.
    const double of_z = 6e-8 * (40 + std::fabs(shift) + t.softcap);
    CHECK(m[i] == m_again[i], kernels.isa, format.name, columns, m[i], m_again[i]);
    CHECK(std::fabs(lse[i] - true_row.lse_others) <= of_z + 1e-7 * std::fabs(true_row.lse_others), kernels.isa,
          format.name, columns, lse[i], true_row.lse_others);
    CHECK(std::fabs(m[i] - true_row.log_odds) <= of_z + 1e-7 * std::fabs(true_row.log_odds), kernels.isa, format.name,
          columns, m[i], true_row.log_odds);
    for (int64_t j = 0; j < columns; ++j) {
      const double true_value = true_row.residual[j];
      const double allowed =
          std::fabs(true_value) * (format.half_ulp() * 1.01 + 2 * of_z) + format.half_subnormal() * 1.01;
      for (const double value : {copy.get(i, j), other.get(i, j)})
        CHECK(std::fabs(value - true_value) <= allowed, kernels.isa, format.name, columns, i, j, value, true_value);
    }
  }
  CHECK(logits.is_intact() && copy.is_intact() && other.is_intact(), kernels.isa, format.name, columns);
}

void check_not_finite(const Kernels& kernels, const Format& format, int64_t columns) {
  for (const double strange : {double{NAN}, HUGE_VAL}) {
    std::mt19937 random(1);
    Guarded logits(2, columns, format.dtype);
    logits.fill(random, 1);
    logits.set(0, columns / 2, strange);
    const std::vector<int64_t> target{0, 0};
    std::vector<double> m(2);
    std::vector<float> scratch(scratch_floats(columns));
    kernels.residual({logits.matrix(), target.data(), {1, 0}}, m.data(), 0, 2, scratch.data());
    CHECK(std::isnan(m[0]) && std::isfinite(m[1]), kernels.isa, format.name, columns, strange, m[0], m[1]);
    CHECK(logits.get(0, 0) == -1, kernels.isa, format.name, columns);
    for (int64_t j = 1; j < columns; ++j)
      CHECK(std::isnan(logits.get(0, j)) && std::isfinite(logits.get(1, j)), kernels.isa, format.name, columns, j);
  }
}

void check_nothing_but_the_target(const Kernels& kernels, const Format& format) {
  for (const int64_t columns : {1, 40}) {  // alone, and where all others are out of the question
    Guarded logits(1, columns, format.dtype);
    for (int64_t j = 0; j < columns; ++j) logits.set(0, j, -HUGE_VAL);
    logits.set(0, 0, 3);
    const int64_t target = 0;
    double m;
    std::vector<float> scratch(scratch_floats(columns));
    kernels.residual({logits.matrix(), &target, {1, 0}}, &m, 0, 1, scratch.data());
    CHECK(m == 3 - LOWEST, kernels.isa, format.name, columns, m);
    CHECK(logits.get(0, 0) == -1, kernels.isa, format.name, columns, logits.get(0, 0));
    for (int64_t j = 1; j < columns; ++j) CHECK(logits.get(0, j) == 0, kernels.isa, format.name, columns, j);
  }
}

constexpr int64_t WIDTHS[] = {1,  2,  3,   7,   8,   9,    15,        16,    17,        31,            32,
                              33, 65, 511, 512, 513, 1537, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 64};

int main() {
  for (const Kernels* kernels : supported_kernels()) {
    for (const Format& format : FORMATS) {
      for (const int64_t columns : WIDTHS) {
        for (const Transform t : {Transform{1, 0}, Transform{0.25f, 0}, Transform{0.7f, 5}, Transform{1, 30}})
          for (const double shift : {0.0, -1e4, 1e4}) check(*kernels, format, columns, t, shift);
        if (columns > 2) check_not_finite(*kernels, format, columns);
      }
      check_nothing_but_the_target(*kernels, format);
    }
  }
  return report();
}
