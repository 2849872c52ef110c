// The hidden states of the rows that matter, scaled and cast on their way into one matrix.

#include "elements.h"
#include "kernels.h"

namespace orpo::ORPO_ISA {

void gather_rows(const GatherRows& a, int64_t begin, int64_t end) {
  for_dtype(a.hidden.dtype, [&](auto from) {
    for_dtype(a.out.dtype, [&](auto to) {
      for (int64_t r = begin; r < end; ++r) {
        const float coefficient = a.coefficient ? a.coefficient[r] : 1.0f;
        const auto* source = a.hidden.row<decltype(from)>(a.position[r]);
        auto* out = a.out.row<decltype(to)>(r);
        for (int64_t left = a.out.columns; left > 0; left -= LANES, source += LANES, out += LANES)
          store(out, load(source, left) * coefficient, left);
      }
    });
  });
}

}  // namespace orpo::ORPO_ISA
