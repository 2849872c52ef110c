// What the columns of a residual hold: the largest entry and the sum, each row by its weight.
//
// A thread has some columns of all rows and adds them up in the order of the rows: neither atomics nor partial sums to
// be joined, the same bits for any number of threads. Its sums stay in the L1 cache.

#include "elements.h"
#include "kernels.h"

namespace orpo::ORPO_ISA {

namespace {

template <class T>
void statistics_of_block(const ColumnStatistics& a, int64_t begin, int64_t count) {
  alignas(64) float peak[BLOCK] = {}, mass[BLOCK] = {};
  for (int64_t r = 0; r < a.residual.rows; ++r) {
    const T* row = a.residual.row<T>(r) + begin;
    const float weight = a.row_weight[r];
    for (int64_t i = 0; i < count; i += PAIR) {
      const Pair entries = load_pair(row + i, count - i);
      for (int k = 0; k < 2; ++k) {
        const int64_t j = i + k * LANES;
        const Vec entry = entries.v[k] * weight;
        store(peak + j, max_of(load(peak + j), entry));
        store(mass + j, load(mass + j) + entry);
      }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    a.peak[begin + i] = peak[place_in_pairs(static_cast<const T*>(nullptr), i)];
    a.mass[begin + i] = mass[place_in_pairs(static_cast<const T*>(nullptr), i)];
  }
}

}  // namespace

void column_statistics(const ColumnStatistics& a, int64_t begin, int64_t end) {
  for_dtype(a.residual.dtype, [&](auto element) {
    for (int64_t start = begin; start < end; start += BLOCK)
      statistics_of_block<decltype(element)>(a, start, end - start < BLOCK ? end - start : BLOCK);
  });
}

}  // namespace orpo::ORPO_ISA
