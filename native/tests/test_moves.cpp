// gather_rows, scatter_rows and sequence_sums against plain loops.

#include "../dispatch.h"
#include "../sequence_sums.h"
#include "check.h"
#include "numbers.h"

using namespace orpo;
using namespace orpo::test;

void check_gather(const Kernels& kernels, const Format& from, const Format& to, int64_t columns) {
  std::mt19937 random(3);
  Guarded hidden(4, columns, from.dtype), out(5, columns, to.dtype);
  hidden.fill(random, 2);
  const std::vector<int64_t> position{3, 0, 0, 2, 3};
  const std::vector<float> coefficient{1.0f, -0.5f, 1e-3f, 7.0f, 0.0f};
  kernels.gather_rows({hidden.matrix(), out.matrix(), position.data(), coefficient.data()}, 0, 5);
  for (int64_t r = 0; r < 5; ++r)
    for (int64_t j = 0; j < columns; ++j) {
      const double product = rounded(hidden.get(position[r], j) * coefficient[r], FORMATS[0]);
      CHECK(out.get(r, j) == rounded(product, to), kernels.isa, from.name, to.name, columns, r, j);
    }
  CHECK(out.is_intact(), kernels.isa, to.name, columns);
}

void check_scatter(const Kernels& kernels, const Format& from, const Format& to, int64_t columns) {
  std::mt19937 random(4);
  Guarded rows(5, columns, from.dtype), out(4, columns, to.dtype);
  rows.fill(random, 2);
  out.fill(random, 2);
  Guarded before = out;
  const std::vector<int64_t> position{3, 0, 3, 3, 1};
  const std::vector<float> coefficient{1.0f, -0.5f, 0.25f, 2.0f, 4.0f};
  const ScatterRows work{out.matrix(), rows.matrix(), position.data(), coefficient.data()};
  for (int64_t begin = 0; begin < columns; begin += 64)  // as threads have them
    kernels.scatter_rows(work, begin, std::min(begin + 64, columns));
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      double sum = before.get(i, j), size = std::fabs(sum);
      for (int64_t r = 0; r < 5; ++r) {
        if (position[r] != i) continue;
        sum += rows.get(r, j) * coefficient[r];
        size += std::fabs(rows.get(r, j) * coefficient[r]);
      }
      const double allowed = 4 * to.half_ulp() * size + to.half_subnormal();
      CHECK(std::fabs(out.get(i, j) - sum) <= allowed, kernels.isa, from.name, to.name, columns, i, j);
      CHECK(i != 2 || out.get(i, j) == before.get(i, j), kernels.isa, "a row that nobody adds to", j);
    }
  CHECK(out.is_intact(), kernels.isa, to.name, columns);
}

void check_sums() {
  const double inf = HUGE_VAL;
  const std::vector<double> m{0, -inf, 800, -800, 1};
  const std::vector<int64_t> sequence{1, 0, 3, 3, 1};
  const bool scored[] = {true, false, true, true, true};
  const std::vector<double> weight{0.5, 0, 0, 2, 0};
  std::vector<double> mean(4, NAN), count(4, NAN), nll(4, NAN);
  sequence_sums({m.data(), sequence.data(), scored, weight.data(), 5, mean.data(), count.data(), nll.data(), 4});
  const auto logp = [](double x) { return -std::log1p(std::exp(-x)); };
  CHECK(mean[0] == 0 && count[0] == 0 && nll[0] == 0, mean[0], count[0], nll[0]);  // weight 0 wins over -inf
  CHECK(std::fabs(mean[1] - (logp(0) + logp(1)) / 2) < 1e-15 && count[1] == 2, mean[1], count[1]);
  CHECK(std::fabs(nll[1] + 0.5 * logp(0)) < 1e-15, nll[1]);
  CHECK(mean[2] == 0 && count[2] == 0, mean[2], count[2]);
  CHECK(mean[3] == -400 && nll[3] == 1600, mean[3], nll[3]);
}

int main() {
  for (const Kernels* kernels : supported_kernels())
    for (const Format& from : FORMATS)
      for (const Format& to : FORMATS)
        for (const int64_t columns : {1, 3, 7, 16, 33, 64, 129, 200}) {
          check_gather(*kernels, from, to, columns);
          check_scatter(*kernels, from, to, columns);
        }
  check_sums();
  return report();
}
