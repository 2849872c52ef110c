// exp and tanh against float64, over all of fp32. An argument sets the step between the bit patterns that are tried:
// 1 is all of them, and takes minutes.

#include <cstdlib>

#include "../dispatch.h"
#include "check.h"
#include "numbers.h"

using namespace orpo;
using namespace orpo::test;

constexpr int64_t CHUNK = 4099;  // no multiple of any vector

// Distance in units of the last place that fp32 has at `truth`.
double ulps(double value, double truth) {
  if (std::isnan(truth)) return std::isnan(value) ? 0 : HUGE_VAL;
  if (rounded(truth, FORMATS[0]) == value) return 0;
  if (std::isinf(value) || std::isinf(truth)) return HUGE_VAL;
  const int exponent = truth == 0 ? -126 : std::max(std::ilogb(truth), -126);
  return std::fabs(value - truth) / std::ldexp(1.0, exponent - 23);
}

void check(const Kernels& kernels, uint64_t step) {
  std::vector<float> x, y(CHUNK), t(CHUNK), slope(CHUNK);
  double worst_exp = 0, worst_tanh = 0, worst_slope = 0;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32;) {
    x.clear();
    for (; x.size() < CHUNK && bits < uint64_t{1} << 32; bits += step)
      x.push_back(float_of(static_cast<uint32_t>(bits)));
    const auto count = static_cast<int64_t>(x.size());
    kernels.exp(x.data(), y.data(), count);
    kernels.tanh(x.data(), t.data(), slope.data(), count);
    for (int64_t i = 0; i < count; ++i) {
      const double v = x[i], e = ulps(y[i], std::exp(v)), true_tanh = std::tanh(v);
      const double cosh = std::cosh(v), of_slope = ulps(slope[i], 1 / cosh / cosh);
      CHECK(e <= 2, kernels.isa, "exp", v, y[i], std::exp(v), e);
      CHECK(ulps(t[i], true_tanh) <= 2, kernels.isa, "tanh", v, t[i], true_tanh);
      CHECK(of_slope <= 4, kernels.isa, "slope", v, slope[i], 1 / cosh / cosh);
      worst_exp = std::max(worst_exp, e);
      worst_tanh = std::max(worst_tanh, ulps(t[i], true_tanh));
      worst_slope = std::max(worst_slope, of_slope);
    }
  }
  std::cout << kernels.isa << ": exp " << worst_exp << ", tanh " << worst_tanh << ", its slope " << worst_slope
            << " ulp\n";
}

void check_exp_of(const Kernels& kernels, float x, float expected) {
  float y;
  kernels.exp(&x, &y, 1);
  CHECK(bits_of(y) == bits_of(expected), kernels.isa, "exp", x, y, expected);
}

int main(int count, char** arguments) {
  const uint64_t step = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 997;
  for (const Kernels* kernels : supported_kernels()) {
    check(*kernels, step);
    const float inf = std::numeric_limits<float>::infinity();
    check_exp_of(*kernels, 0.0f, 1.0f);
    check_exp_of(*kernels, -0.0f, 1.0f);
    check_exp_of(*kernels, inf, inf);
    check_exp_of(*kernels, -inf, 0.0f);
    check_exp_of(*kernels, 88.72284f, inf);  // beyond log(largest)
    check_exp_of(*kernels, -103.98f, 0.0f);  // beyond log(smallest subnormal / 2)
  }
  return report();
}
