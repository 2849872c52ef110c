// The kernels that exist once for each instruction set. Each works on a range of rows (or columns) of its arguments, so
// that whoever calls it decides which thread does what. See `orpo_kernels/ops/torch_ops.py` for what they compute:
//
//     lse_others = logsumexp_{j != y} z_j        m = z_y - lse_others        residual_j = exp(z_j - lse_others)

#pragma once

#include <cstdint>

#include "dtypes.h"

namespace orpo {

struct Matrix {
  void* data;
  int64_t rows, columns;
  int64_t stride;  // elements from one row to the next; the columns lie side by side
  DType dtype;

  template <class T>
  T* row(int64_t i) const {
    return static_cast<T*>(data) + i * stride;
  }
};

struct Transform {
  float scale;
  float softcap;  // 0: none
};

struct Logits {
  Matrix z;               // (C, V) logits before scale and soft-cap
  const int64_t* target;  // (C,)
  Transform transform;
};

struct ColumnStatistics {
  Matrix residual;          // (B, V)
  const float* row_weight;  // (B,)
  float *peak, *mass;       // (V,)
};

struct GatherColumns {
  Matrix residual, out;  // (B, V) and (B, A), of one dtype
  const int64_t* columns;  // (A,)
  double* sums;            // (B,)
};

struct GatherRows {
  Matrix hidden, out;
  const int64_t* position;
  const float* coefficient;  // or null: 1
};

struct ScatterRows {
  Matrix out, rows;
  const int64_t* position;
  const float* coefficient;
};

struct Kernels {
  const char* isa;

  // z becomes its residual; m (C,). `scratch` has room for `scratch_floats`.
  void (*residual)(const Logits&, double* log_odds, int64_t begin, int64_t end, float* scratch);

  // m and lse_others (C,), z only read.
  void (*statistics)(const Logits&, double* log_odds, double* lse_others, int64_t begin, int64_t end);

  // z, some columns of the logits, becomes their residual by the lse_others of the whole rows.
  // The target is in other columns where it is outside [0, columns).
  void (*recomputed_residual)(const Logits&, const double* lse_others, int64_t begin, int64_t end);

  // Of the columns [begin, end): the largest of row_weight[r] * residual[r], at least 0, and their sum.
  void (*column_statistics)(const ColumnStatistics&, int64_t begin, int64_t end);

  // out[r] = residual[r, columns], and the sum of these entries
  void (*gather_columns)(const GatherColumns&, int64_t begin, int64_t end);

  // out[r] = coefficient[r] * hidden[position[r]]
  void (*gather_rows)(const GatherRows&, int64_t begin, int64_t end);

  // out[position[r]] += coefficient[r] * rows[r] for every r in order, in the columns [begin, end)
  void (*scatter_rows)(const ScatterRows&, int64_t begin, int64_t end);

  // The functions that the others are made of, to be tested and timed.
  void (*exp)(const float* x, float* out, int64_t count);
  void (*tanh)(const float* x, float* out, float* slope, int64_t count);
};

constexpr int64_t BLOCK = 2048;  // columns that are taken at a time: in fp32 they stay in the L1 cache

// The residual of a row before it is rounded, and the reference that each of its blocks was taken relative to.
constexpr int64_t scratch_floats(int64_t columns) {
  const int64_t blocks = (columns + BLOCK - 1) / BLOCK;
  return blocks * BLOCK + blocks;
}

}  // namespace orpo
