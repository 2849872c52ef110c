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
      using To = decltype(to);
      for (int64_t r = 0; r < a.rows.rows; ++r) {
        To* out = a.out.row<To>(a.position[r]) + begin;
        const int64_t count = end - begin;
        map(a.rows.row<decltype(from)>(r) + begin, out, count, [&](Vec v, int64_t i) {
          const Vec sum = i + LANES <= count ? load(out + i) : load_some(out + i, count - i);
          return sum + v * a.coefficient[r];
        });
      }
    });
  });
}

}  // namespace orpo::ORPO_ISA
