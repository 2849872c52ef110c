// Some columns of a residual, side by side, and the sum of each row of them.

#include "elements.h"
#include "kernels.h"

namespace orpo::ORPO_ISA {

namespace {

template <class T>
void gather_columns_of_rows(const GatherColumns& a, int64_t begin, int64_t end) {
  const int64_t count = a.out.columns;
  for (int64_t r = begin; r < end; ++r) {
    const T* row = a.residual.row<T>(r);
    T* out = a.out.row<T>(r);
    for (int64_t i = 0; i < count; ++i) out[i] = row[a.columns[i]];
    double sum = 0;
    for (int64_t start = 0; start < count; start += BLOCK) {  // in fp32 within a block, in float64 from there on
      const int64_t stop = count - start < BLOCK ? count : start + BLOCK;
      Pair lanes = {};
      for (int64_t i = start; i < stop; i += PAIR) {
        const Pair entries = load_pair(out + i, stop - i);
        for (int k = 0; k < 2; ++k) lanes.v[k] += entries.v[k];
      }
      sum += sum_of(lanes.v[0] + lanes.v[1]);
    }
    a.sums[r] = sum;
  }
}

}  // namespace

void gather_columns(const GatherColumns& a, int64_t begin, int64_t end) {
  for_dtype(a.residual.dtype, [&](auto element) { gather_columns_of_rows<decltype(element)>(a, begin, end); });
}

}  // namespace orpo::ORPO_ISA
