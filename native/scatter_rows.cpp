// Rows, each times its coefficient, added to the positions they belong to.
//
// A thread has some columns of all rows, and adds them up in the order of the rows: neither atomics nor a sort, the
// same bits for any number of threads, however often a position repeats.

#include "elements.h"
#include "kernels.h"

namespace orpo::ORPO_ISA {

void scatter_rows(const ScatterRows& a, int64_t begin, int64_t end) {
  for_dtype(a.rows.dtype, [&](auto from) {
    for_dtype(a.out.dtype, [&](auto to) {
      for (int64_t r = 0; r < a.rows.rows; ++r) {
        const auto* source = a.rows.row<decltype(from)>(r) + begin;
        auto* out = a.out.row<decltype(to)>(a.position[r]) + begin;
        for (int64_t left = end - begin; left > 0; left -= LANES, source += LANES, out += LANES)
          store(out, load(out, left) + load(source, left) * a.coefficient[r], left);
      }
    });
  });
}

}  // namespace orpo::ORPO_ISA
