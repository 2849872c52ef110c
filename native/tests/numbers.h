// The definitions that kernels are compared with: floats of every width by plain arithmetic, and a matrix of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../kernels.h"

namespace orpo::test {

struct Format {
  DType dtype;
  const char* name;
  int fraction_bits, least_exponent, largest_exponent;
  double half_ulp() const { return std::ldexp(1.0, -fraction_bits - 1); }
  double half_subnormal() const { return std::ldexp(1.0, least_exponent - fraction_bits - 1); }
};

constexpr Format FORMATS[] = {
    {DType::fp32, "fp32", 23, -126, 127},
    {DType::bf16, "bf16", 7, -126, 127},
    {DType::fp16, "fp16", 10, -14, 15},
};

inline const Format& format_of(DType dtype) { return FORMATS[static_cast<int>(dtype)]; }
inline int64_t size_of(DType dtype) { return dtype == DType::fp32 ? 4 : 2; }

// To nearest, ties to even.
inline double rounded(double x, const Format& f) {
  if (!std::isfinite(x) || x == 0) return x;
  const int exponent = std::max(std::ilogb(x), f.least_exponent);
  const int shift = f.fraction_bits - exponent;
  const double value = std::ldexp(std::nearbyint(std::ldexp(x, shift)), -shift);
  return std::fabs(value) < std::ldexp(1.0, f.largest_exponent + 1) ? value : std::copysign(HUGE_VAL, x);
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline double decoded(uint32_t bits, const Format& f) {
  if (f.dtype == DType::fp32) return float_of(bits);
  if (f.dtype == DType::bf16) return float_of(bits << 16);
  const double sign = bits & 0x8000 ? -1 : 1;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * HUGE_VAL;
  return sign * std::ldexp(exponent ? 1024 + fraction : fraction, (exponent ? exponent : 1) - 25);
}

// The bits of a number that the format holds.
inline uint32_t encoded(double x, const Format& f) {
  if (f.dtype == DType::fp32) return bits_of(static_cast<float>(x));
  if (f.dtype == DType::bf16) return bits_of(static_cast<float>(x)) >> 16;
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7e00;
  if (std::isinf(x)) return sign | 0x7c00;
  if (x == 0) return sign;
  const int exponent = std::max(std::ilogb(x), -14);
  const auto fraction = static_cast<uint32_t>(std::ldexp(std::fabs(x), 10 - exponent));
  return sign | (fraction < 1024 ? fraction : static_cast<uint32_t>(exponent + 15) << 10 | (fraction - 1024));
}

// Rows that lie apart, begin at odd addresses and have a guard around them.
class Guarded {
 public:
  Guarded(int64_t rows, int64_t columns, DType dtype)
      : format(format_of(dtype)), rows(rows), columns(columns), stride(columns + 3), bytes(size_of(dtype)),
        data((rows * stride + 4) * bytes, GUARD) {}

  Matrix matrix() { return {data.data() + bytes, rows, columns, stride, format.dtype}; }

  void set(int64_t i, int64_t j, double x) {
    const uint32_t bits = encoded(rounded(x, format), format);
    std::memcpy(at(i, j), &bits, bytes);
  }

  double get(int64_t i, int64_t j) {
    uint32_t bits = 0;
    std::memcpy(&bits, at(i, j), bytes);
    return decoded(bits, format);
  }

  void fill(std::mt19937& random, double spread) {
    std::normal_distribution<double> normal(0, spread);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) set(i, j, normal(random));
  }

  bool is_intact() {
    std::vector<bool> mine(data.size(), false);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns * bytes; ++j) mine[at(i, 0) - data.data() + j] = true;
    for (size_t k = 0; k < data.size(); ++k)
      if (!mine[k] && data[k] != GUARD) return false;
    return true;
  }

  const Format& format;

 private:
  static constexpr unsigned char GUARD = 0xa5;
  unsigned char* at(int64_t i, int64_t j) { return data.data() + (1 + i * stride + j) * bytes; }
  int64_t rows, columns, stride, bytes;
  std::vector<unsigned char> data;
};

}  // namespace orpo::test
