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
void gather_rows(const GatherRows&, int64_t, int64_t);
void scatter_rows(const ScatterRows&, int64_t, int64_t);

namespace {

void exp(const float* x, float* out, int64_t count) {
  map(x, out, count, [](Vec v, int64_t) { return exp_of(v); });
}

void tanh(const float* x, float* out, float* slope, int64_t count) {
  map(x, out, count, [](Vec v, int64_t) { return tanh_of(v).value; });
  map(x, slope, count, [](Vec v, int64_t) { return tanh_of(v).slope; });
}

}  // namespace

extern const Kernels kernels;
const Kernels kernels = {
    ORPO_TEXT(ORPO_ISA), residual, statistics, recomputed_residual, gather_rows, scatter_rows, exp, tanh,
};

}  // namespace orpo::ORPO_ISA
