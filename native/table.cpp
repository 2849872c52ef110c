// The kernels of one instruction set.

#include "elements.h"
#include "kernels.h"
#include "vec_math.h"

#define ORPO_TEXT(name) ORPO_QUOTE(name)
#define ORPO_QUOTE(name) #name

namespace orpo::ORPO_ISA {

void residual(const Logits&, double*, int64_t, int64_t, float*);
void statistics(const Logits&, double*, double*, int64_t, int64_t);
void recomputed_residual(const Logits&, const double*, int64_t, int64_t);
void column_statistics(const ColumnStatistics&, int64_t, int64_t);
void gather_columns(const GatherColumns&, int64_t, int64_t);
void gather_rows(const GatherRows&, int64_t, int64_t);
void scatter_rows(const ScatterRows&, int64_t, int64_t);

namespace {

void exp(const float* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i += PAIR) {
    Pair p = load_pair(x + i, count - i);
    exp_(p.v);
    store_pair(out + i, p, count - i);
  }
}

void tanh(const float* x, float* out, float* slope, int64_t count) {
  for (int64_t i = 0; i < count; i += PAIR) {
    Pair p = load_pair(x + i, count - i), slopes;
    tanh_(p.v, slopes.v);
    store_pair(out + i, p, count - i);
    store_pair(slope + i, slopes, count - i);
  }
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    ORPO_TEXT(ORPO_ISA), residual,    statistics,   recomputed_residual, column_statistics,
    gather_columns,      gather_rows, scatter_rows, exp,                 tanh,
};

}  // namespace orpo::ORPO_ISA
