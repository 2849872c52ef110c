// Conversions between fp32, bf16 and fp16, as `gather_rows` makes them: every 16-bit number, and floats of every kind.

#include "../dispatch.h"
#include "check.h"
#include "numbers.h"

using namespace orpo;
using namespace orpo::test;

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b && std::signbit(a) == std::signbit(b); }

void copy(const Kernels& kernels, void* from, DType from_dtype, void* to, DType to_dtype, int64_t count) {
  const int64_t position = 0;
  kernels.gather_rows({{from, 1, count, count, from_dtype}, {to, 1, count, count, to_dtype}, &position, nullptr}, 0, 1);
}

void check_widening(const Kernels& kernels, const Format& format) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  std::vector<float> wide(all.size());
  std::vector<uint16_t> back(all.size());
  copy(kernels, all.data(), format.dtype, wide.data(), DType::fp32, 65536);
  copy(kernels, wide.data(), DType::fp32, back.data(), format.dtype, 65536);
  for (uint32_t i = 0; i < 65536; ++i) {
    CHECK(same(wide[i], decoded(i, format)), kernels.isa, format.name, i, wide[i]);
    CHECK(same(decoded(back[i], format), wide[i]), kernels.isa, format.name, "and back", i, wide[i]);
  }
}

void check_rounding(const Kernels& kernels, const Format& format) {
  std::vector<float> wide;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += 4093) wide.push_back(float_of(static_cast<uint32_t>(bits)));
  for (uint32_t i = 0; i < 65536; ++i) {  // on and around what lies half-way between two numbers of the format
    const double x = decoded(i, format), next = decoded(i + 1, format);
    if (!std::isfinite(x) || !std::isfinite(next)) continue;
    const auto tie = static_cast<float>((x + next) / 2);
    wide.insert(wide.end(), {std::nextafter(tie, -HUGE_VALF), tie, std::nextafter(tie, HUGE_VALF)});
  }
  for (const uint32_t nan : {0x7f800001u, 0x7fffffffu, 0xff800001u, 0xffffffffu, 0x7fc00000u})
    wide.push_back(float_of(nan));
  const auto count = static_cast<int64_t>(wide.size());
  std::vector<uint16_t> narrow(wide.size());
  copy(kernels, wide.data(), DType::fp32, narrow.data(), format.dtype, count);
  for (int64_t i = 0; i < count; ++i)
    CHECK(same(decoded(narrow[i], format), rounded(wide[i], format)), kernels.isa, format.name, wide[i],
          decoded(narrow[i], format));
}

int main() {
  for (const Kernels* kernels : supported_kernels()) {
    for (const Format& format : {FORMATS[1], FORMATS[2]}) {
      check_widening(*kernels, format);
      check_rounding(*kernels, format);
    }
  }
  return report();
}
