// The Python module `orpo_kernels._native`. Tensors come in through DLPack, without a copy and without PyTorch's
// headers; shapes, dtypes and indices are checked here, so that no kernel reads or writes where it should not.

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "dispatch.h"
#include "kernels.h"
#include "label_rows.h"
#include "odds_ratio.h"
#include "sequence_sums.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace orpo {

namespace {

using Array = nb::ndarray<nb::device::cpu>;

const Kernels* kernels = nullptr;  // chosen when the module is imported

// ---------------------------------------------------------------------------------------------------------------------
// Arguments
// ---------------------------------------------------------------------------------------------------------------------

std::string shape_of(const Array& array) {
  std::string text = "(";
  for (size_t i = 0; i < array.ndim(); ++i) text += (i ? ", " : "") + std::to_string(array.shape(i));
  return text + ")";
}

[[noreturn]] void refuse(const std::string& message) {
  throw std::invalid_argument("orpo_kernels._native: " + message);
}

std::string type_of(const Array& array) {
  return std::to_string(array.dtype().bits) + " bits and DLPack's type code " + std::to_string(array.dtype().code);
}

void check_shape(const Array& array, const std::string& name, std::initializer_list<int64_t> wanted) {
  bool is_right = array.ndim() == wanted.size();
  std::string text;
  size_t i = 0;
  for (const int64_t size : wanted) {
    is_right = is_right && (size < 0 || array.shape(i) == static_cast<size_t>(size));
    text += (i++ ? ", " : "") + (size < 0 ? "any" : std::to_string(size));
  }
  if (!is_right) refuse(name + " has shape " + shape_of(array) + ", it must be (" + text + ")");
}

// A matrix whose columns lie side by side; its rows may lie anywhere.
Matrix matrix(const Array& array, const std::string& name, int64_t rows = -1, int64_t columns = -1) {
  check_shape(array, name, {rows, columns});
  const auto code = static_cast<nb::dlpack::dtype_code>(array.dtype().code);
  const bool is_float = code == nb::dlpack::dtype_code::Float;
  DType dtype;
  if (is_float && array.dtype().bits == 32) {
    dtype = DType::fp32;
  } else if (is_float && array.dtype().bits == 16) {
    dtype = DType::fp16;
  } else if (code == nb::dlpack::dtype_code::Bfloat && array.dtype().bits == 16) {
    dtype = DType::bf16;
  } else {
    refuse(name + " has elements of " + type_of(array) + ", it must be float32, bfloat16 or float16");
  }
  if (array.shape(1) > 1 && array.stride(1) != 1)
    refuse("the columns of " + name + " are " + std::to_string(array.stride(1)) +
           " elements apart, they must lie side by side");
  return {array.data(), static_cast<int64_t>(array.shape(0)), static_cast<int64_t>(array.shape(1)), array.stride(0),
          dtype};
}

template <class T>
T* vector(const Array& array, const std::string& name, int64_t size) {
  check_shape(array, name, {size});
  if (array.dtype() != nb::dtype<T>())
    refuse(name + " has elements of " + type_of(array) + ", it must have " + std::to_string(nb::dtype<T>().bits) +
           " and " + std::to_string(nb::dtype<T>().code));
  if (size > 1 && array.stride(0) != 1)
    refuse(name + " has stride " + std::to_string(array.stride(0)) + ", it must be 1");
  return static_cast<T*>(array.data());
}

double number(const Array& array, const std::string& name) {
  if (array.size() != 1 || array.dtype() != nb::dtype<double>()) refuse(name + " must be one number of float64");
  return *static_cast<const double*>(array.data());
}

// Integers whose columns lie side by side; how far apart the rows are.
std::pair<const int64_t*, int64_t> table(const Array& array, const std::string& name, int64_t rows, int64_t columns) {
  check_shape(array, name, {rows, columns});
  if (array.dtype() != nb::dtype<int64_t>()) refuse(name + " has elements of " + type_of(array) + ", it must be int64");
  if (columns > 1 && array.stride(1) != 1) refuse("the columns of " + name + " must lie side by side");
  return {static_cast<const int64_t*>(array.data()), array.stride(0)};
}

const int64_t* indices(const Array& array, const std::string& name, int64_t size, int64_t limit) {
  const int64_t* index = vector<int64_t>(array, name, size);
  for (int64_t i = 0; i < size; ++i)
    if (index[i] < 0 || index[i] >= limit)
      throw std::out_of_range("orpo_kernels._native: " + name + " holds " + std::to_string(index[i]) +
                              ", it must be in [0, " + std::to_string(limit) + ")");
  return index;
}

Transform transform(float scale, std::optional<float> softcap) { return {scale, softcap.value_or(0.0f)}; }

// As many items as are worth waking a thread for.
int64_t grain(int64_t width) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)); }

// ---------------------------------------------------------------------------------------------------------------------
// The functions
// ---------------------------------------------------------------------------------------------------------------------

void residual_(const Array& logits, const Array& target, const Array& log_odds, float scale,
               std::optional<float> softcap, int threads) {
  const Matrix z = matrix(logits, "logits");
  const Logits a{z, indices(target, "target", z.rows, z.columns), transform(scale, softcap)};
  double* m = vector<double>(log_odds, "log_odds", z.rows);
  const nb::gil_scoped_release release;
  const int64_t room = scratch_floats(z.columns);
  const std::unique_ptr<float[]> scratch(new float[room * threads]);
  for_ranges(threads, z.rows, grain(z.columns), [&](int thread, int64_t begin, int64_t end) {
    kernels->residual(a, m, begin, end, scratch.get() + thread * room);
  });
}

void statistics(const Array& logits, const Array& target, const Array& log_odds, const Array& lse_others, float scale,
                std::optional<float> softcap, int threads) {
  const Matrix z = matrix(logits, "logits");
  const Logits a{z, indices(target, "target", z.rows, z.columns), transform(scale, softcap)};
  double* m = vector<double>(log_odds, "log_odds", z.rows);
  double* lse = vector<double>(lse_others, "lse_others", z.rows);
  const nb::gil_scoped_release release;
  for_ranges(threads, z.rows, grain(z.columns),
             [&](int, int64_t begin, int64_t end) { kernels->statistics(a, m, lse, begin, end); });
}

void recomputed_residual_(const Array& logits, const Array& target, const Array& lse_others, float scale,
                          std::optional<float> softcap, int threads) {
  const Matrix z = matrix(logits, "logits");
  const Logits a{z, vector<int64_t>(target, "target", z.rows), transform(scale, softcap)};
  const double* lse = vector<double>(lse_others, "lse_others", z.rows);
  const nb::gil_scoped_release release;
  for_ranges(threads, z.rows, grain(z.columns),
             [&](int, int64_t begin, int64_t end) { kernels->recomputed_residual(a, lse, begin, end); });
}

void column_statistics(const Array& residual, const Array& row_weight, const Array& peak, const Array& mass,
                       int threads) {
  const Matrix r = matrix(residual, "residual");
  const ColumnStatistics a{r, vector<float>(row_weight, "row_weight", r.rows), vector<float>(peak, "peak", r.columns),
                           vector<float>(mass, "mass", r.columns)};
  const nb::gil_scoped_release release;
  for_ranges(threads, r.columns, 2 * BLOCK,
             [&](int, int64_t begin, int64_t end) { kernels->column_statistics(a, begin, end); });
}

void gather_columns(const Array& residual, const Array& columns, const Array& out, const Array& sums, int threads) {
  const Matrix from = matrix(residual, "residual");
  check_shape(columns, "columns", {-1});
  const int64_t count = columns.shape(0);
  const Matrix to = matrix(out, "out", from.rows, count);
  if (to.dtype != from.dtype) refuse("residual and out have different dtypes, they must have the same");
  const GatherColumns a{from, to, indices(columns, "columns", count, from.columns),
                        vector<double>(sums, "sums", from.rows)};
  const nb::gil_scoped_release release;
  for_ranges(threads, from.rows, grain(count),
             [&](int, int64_t begin, int64_t end) { kernels->gather_columns(a, begin, end); });
}

void gather_rows(const Array& hidden, const Array& position, const std::optional<Array>& coefficient, const Array& out,
                 int threads) {
  const Matrix from = matrix(hidden, "hidden");
  const Matrix to = matrix(out, "out", -1, from.columns);
  const GatherRows a{from, to, indices(position, "position", to.rows, from.rows),
                     coefficient ? vector<float>(*coefficient, "coefficient", to.rows) : nullptr};
  const nb::gil_scoped_release release;
  for_ranges(threads, to.rows, grain(to.columns),
             [&](int, int64_t begin, int64_t end) { kernels->gather_rows(a, begin, end); });
}

void scatter_rows_(const Array& out, const Array& position, const Array& rows, const Array& coefficient, int threads) {
  const Matrix to = matrix(out, "out");
  const Matrix from = matrix(rows, "rows", -1, to.columns);
  const ScatterRows a{to, from, indices(position, "position", from.rows, to.rows),
                      vector<float>(coefficient, "coefficient", from.rows)};
  const nb::gil_scoped_release release;
  // A cache line at least: two threads never write to the same one.
  const int64_t columns = std::max<int64_t>(64, ((to.columns + threads - 1) / std::max(threads, 1) + 63) / 64 * 64);
  for_ranges(threads, to.columns, columns,
             [&](int, int64_t begin, int64_t end) { kernels->scatter_rows(a, begin, end); });
}

// Of rows: their log-odds, sequences, whether they are scored, and their weights.
struct RowArrays {
  const double* log_odds;
  const int64_t* sequence;
  const bool* scored;
  const double* nll_weight;
  int64_t rows;

  RowArrays(const Array& m, const Array& s, const Array& is_scored, const Array& weight, int64_t sequences) {
    check_shape(m, "log_odds", {-1});
    rows = m.shape(0);
    log_odds = vector<double>(m, "log_odds", rows);
    sequence = indices(s, "sequence", rows, sequences);
    scored = vector<bool>(is_scored, "scored", rows);
    nll_weight = vector<double>(weight, "nll_weight", rows);
  }

  // (3 * sequences,): mean log-probabilities, numbers of scored rows, NLL.
  void sum_into(double* sums, int64_t sequences) const {
    sequence_sums({log_odds, sequence, scored, nll_weight, rows, sums, sums + sequences, sums + 2 * sequences,
                   sequences});
  }
};

void sums(const Array& log_odds, const Array& sequence, const Array& scored, const Array& nll_weight,
          const Array& out) {
  check_shape(out, "sums", {-1});
  const int64_t sequences = out.shape(0) / 3;
  const RowArrays rows(log_odds, sequence, scored, nll_weight, sequences);
  double* to = vector<double>(out, "sums", 3 * sequences);
  const nb::gil_scoped_release release;
  rows.sum_into(to, sequences);
}

void pairs(const Array& log_odds, const Array& sequence, const Array& scored, const Array& nll_weight,
           const std::optional<Array>& sums, const std::optional<Array>& pair_weight, double alpha, double beta,
           const Array& nll_count, const Array& pair_count, const Array& numbers, const Array& valid,
           const Array& grad) {
  check_shape(valid, "valid", {-1});
  const int64_t pairs = valid.shape(0);
  const RowArrays r(log_odds, sequence, scored, nll_weight, 2 * pairs);
  std::vector<double> own(sums ? 0 : 6 * pairs);
  double* of_sequences = sums ? vector<double>(*sums, "sums", 6 * pairs) : own.data();
  const OddsRatio a{
      r.log_odds,
      r.sequence,
      r.scored,
      r.nll_weight,
      r.rows,
      of_sequences,
      of_sequences + 2 * pairs,
      of_sequences + 4 * pairs,
      pair_weight ? vector<double>(*pair_weight, "pair_weight", pairs) : nullptr,
      pairs,
      alpha,
      beta,
      number(nll_count, "nll_count"),
      number(pair_count, "pair_count"),
      vector<double>(numbers, "numbers", 3 + 3 * pairs),
      vector<bool>(valid, "valid", pairs),
      vector<double>(grad, "grad", r.rows),
  };
  const nb::gil_scoped_release release;
  if (!sums) r.sum_into(of_sequences, 2 * pairs);
  odds_ratio(a);
}

std::pair<int64_t, bool> rows_of_labels(const Array& labels, const std::optional<Array>& nll_labels, bool shift,
                                        int64_t ignore_index, bool per_sequence, const Array& integers,
                                        const Array& scored, const Array& nll_weight, const Array& offsets,
                                        const Array& counts) {
  check_shape(labels, "labels", {-1, -1});
  const int64_t pairs = labels.shape(0) / 2, length = labels.shape(1);
  const auto [own, stride] = table(labels, "labels", 2 * pairs, length);
  const auto [other, nll_stride] = nll_labels ? table(*nll_labels, "nll_labels", pairs, length)
                                              : std::pair<const int64_t*, int64_t>{nullptr, 0};
  const int64_t most = (2 + nll_labels.has_value()) * pairs * length;
  const Labels a{own, other, stride, nll_stride, pairs, length, shift, ignore_index, per_sequence};
  int64_t* position = vector<int64_t>(integers, "integers", 3 * most);
  const LabelRows out{position, position + most, position + 2 * most, vector<bool>(scored, "scored", most),
                      vector<double>(nll_weight, "nll_weight", most),
                      vector<int64_t>(offsets, "offsets", 2 * pairs + 1)};
  double* to = vector<double>(counts, "counts", 2);
  const nb::gil_scoped_release release;
  const FoundRows found = label_rows(a, out);
  const Counts counted = count_rows(out.sequence, out.scored, out.nll_weight, found.count, pairs);
  to[0] = counted.nll;
  to[1] = counted.pairs;
  return {found.count, found.unique_positions};
}

void counts(const Array& sequence, const Array& scored, const Array& nll_weight, int64_t pairs, const Array& out) {
  check_shape(sequence, "sequence", {-1});
  const int64_t rows = sequence.shape(0);
  const int64_t* s = indices(sequence, "sequence", rows, 2 * pairs);
  const bool* is_scored = vector<bool>(scored, "scored", rows);
  const double* weight = vector<double>(nll_weight, "nll_weight", rows);
  double* to = vector<double>(out, "out", 2);
  const Counts found = count_rows(s, is_scored, weight, rows, pairs);
  to[0] = found.nll;
  to[1] = found.pairs;
}

bool are_within(const Array& position, int64_t num_positions, const Array& target, int64_t vocab_size) {
  check_shape(position, "position", {-1});
  const int64_t rows = position.shape(0);
  const auto within = [rows](const int64_t* index, int64_t limit) {
    return std::all_of(index, index + rows, [limit](int64_t i) { return i >= 0 && i < limit; });
  };
  return within(vector<int64_t>(position, "position", rows), num_positions) &&
         within(vector<int64_t>(target, "target", rows), vocab_size);
}

void exp_into(const Array& x, const Array& out, int64_t repeats, int threads) {
  check_shape(x, "x", {-1});
  const int64_t count = x.shape(0);
  const float* from = vector<float>(x, "x", count);
  float* to = vector<float>(out, "out", count * threads);
  const nb::gil_scoped_release release;
  for_ranges(threads, threads, 1, [&](int, int64_t begin, int64_t) {
    for (int64_t i = 0; i < repeats; ++i) kernels->exp(from, to + begin * count, count);
  });
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* supported : supported_kernels()) names.emplace_back(supported->isa);
  return names;
}

}  // namespace

NB_MODULE(_native, m) {
  const char* isa = std::getenv("ORPO_KERNELS_ISA");
  kernels = &select_kernels(isa ? isa : "");

  m.doc() = "The row-wise operations of orpo_kernels on a CPU; `orpo_kernels.ops.native` is how they are called.";
  m.def("residual_", residual_, "logits"_a, "target"_a, "log_odds"_a, "scale"_a, "softcap"_a.none(), "threads"_a);
  m.def("statistics", statistics, "logits"_a, "target"_a, "log_odds"_a, "lse_others"_a, "scale"_a, "softcap"_a.none(),
        "threads"_a);
  m.def("recomputed_residual_", recomputed_residual_, "logits"_a, "target"_a, "lse_others"_a, "scale"_a,
        "softcap"_a.none(), "threads"_a);
  m.def("column_statistics", column_statistics, "residual"_a, "row_weight"_a, "peak"_a, "mass"_a, "threads"_a);
  m.def("gather_columns", gather_columns, "residual"_a, "columns"_a, "out"_a, "sums"_a, "threads"_a);
  m.def("gather_rows", gather_rows, "hidden"_a, "position"_a, "coefficient"_a.none(), "out"_a, "threads"_a);
  m.def("scatter_rows_", scatter_rows_, "out"_a, "position"_a, "rows"_a, "coefficient"_a, "threads"_a);
  m.def("sequence_sums", sums, "log_odds"_a, "sequence"_a, "scored"_a, "nll_weight"_a, "sums"_a);
  m.def("odds_ratio", pairs, "log_odds"_a, "sequence"_a, "scored"_a, "nll_weight"_a, "sums"_a.none(),
        "pair_weight"_a.none(), "alpha"_a, "beta"_a, "nll_count"_a, "pair_count"_a, "numbers"_a, "valid"_a, "grad"_a);
  m.def("label_rows", rows_of_labels, "labels"_a, "nll_labels"_a.none(), "shift"_a, "ignore_index"_a, "per_sequence"_a,
        "integers"_a, "scored"_a, "nll_weight"_a, "offsets"_a, "counts"_a,
        "How many rows were written, and whether no position occurs twice.");
  m.def("count_rows", counts, "sequence"_a, "scored"_a, "nll_weight"_a, "pairs"_a, "out"_a);
  m.def("are_within", are_within, "position"_a, "num_positions"_a, "target"_a, "vocab_size"_a);
  m.def("exp", exp_into, "x"_a, "out"_a, "repeats"_a, "threads"_a,
        "exp(x) into `out`, which has room for it once a thread; to be tested, and timed by `repeats`.");
  m.def("isa", [] { return std::string(kernels->isa); }, "The instruction set whose kernels run.");
  m.def("isas", isas, "The instruction sets that this processor has kernels for, the best first.");
  m.def("thread_source", thread_source, "The OpenMP library whose threads are used, or \"std::thread\".");
}

}  // namespace orpo
