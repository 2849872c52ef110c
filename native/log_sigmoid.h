#pragma once

#include <cmath>

namespace orpo {

inline double log_sigmoid(double x) { return (x < 0 ? x : 0.0) - std::log1p(std::exp(-std::fabs(x))); }

}  // namespace orpo
