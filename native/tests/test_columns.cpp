// column_statistics and gather_columns against plain loops.

#include "../dispatch.h"
#include "check.h"
#include "numbers.h"

using namespace orpo;
using namespace orpo::test;

constexpr int64_t ROWS = 5;

void check_statistics(const Kernels& kernels, const Format& format, int64_t columns) {
  std::mt19937 random(5);
  Guarded residual(ROWS, columns, format.dtype);
  residual.fill(random, 1);
  const std::vector<float> weight{1.0f, 0.0f, 0.25f, 1e-3f, 0.7f};
  std::vector<float> peak(columns + 1, NAN), mass(columns + 1, NAN);
  const ColumnStatistics work{residual.matrix(), weight.data(), peak.data(), mass.data()};
  for (int64_t begin = 0; begin < columns; begin += 2 * BLOCK)  // as threads have them
    kernels.column_statistics(work, begin, std::min(begin + 2 * BLOCK, columns));
  for (int64_t j = 0; j < columns; ++j) {
    double top = 0, sum = 0, size = 0;
    for (int64_t r = 0; r < ROWS; ++r) {
      const double entry = residual.get(r, j) * weight[r];
      top = std::max(top, entry);
      sum += entry;
      size += std::fabs(entry);
    }
    CHECK(std::fabs(peak[j] - top) <= 1e-7 * top, kernels.isa, format.name, columns, j, peak[j], top);
    CHECK(std::fabs(mass[j] - sum) <= 5e-7 * size, kernels.isa, format.name, columns, j, mass[j], sum);
  }
  CHECK(std::isnan(peak[columns]) && std::isnan(mass[columns]), kernels.isa, format.name, columns);
}

void check_gather(const Kernels& kernels, const Format& format, int64_t columns, int64_t count) {
  std::mt19937 random(6);
  Guarded residual(ROWS, columns, format.dtype), out(ROWS, count, format.dtype);
  residual.fill(random, 1);
  std::vector<int64_t> at(count);
  for (int64_t i = 0; i < count; ++i) at[i] = i * columns / count;
  std::vector<double> sums(ROWS, NAN);
  kernels.gather_columns({residual.matrix(), out.matrix(), at.data(), sums.data()}, 0, ROWS);
  for (int64_t r = 0; r < ROWS; ++r) {
    double sum = 0, size = 0;
    for (int64_t i = 0; i < count; ++i) {
      CHECK(out.get(r, i) == residual.get(r, at[i]), kernels.isa, format.name, columns, r, i);
      sum += residual.get(r, at[i]);
      size += std::fabs(residual.get(r, at[i]));
    }
    CHECK(std::fabs(sums[r] - sum) <= 1e-6 * size, kernels.isa, format.name, columns, r, sums[r], sum);
  }
  CHECK(out.is_intact(), kernels.isa, format.name, columns);
}

constexpr int64_t WIDTHS[] = {1, 3, 16, 33, 511, 513, 1200, 2100, 2 * BLOCK + 52};  // the last for two threads

int main() {
  for (const Kernels* kernels : supported_kernels())
    for (const Format& format : FORMATS)
      for (const int64_t columns : WIDTHS) {
        check_statistics(*kernels, format, columns);
        for (const int64_t count : {int64_t{0}, columns / 3, columns}) check_gather(*kernels, format, columns, count);
      }
  return report();
}
