// The types of the matrices' elements.

#pragma once

#include <cstdint>

namespace orpo {

struct bf16 {
  uint16_t bits;
};

struct fp16 {
  uint16_t bits;
};

enum class DType { fp32, bf16, fp16 };

}  // namespace orpo
