// Where the rows of a tensor [..., C] lie and which of them are scored.
#pragma once

#include "core/numeric.h"
#include "cuda/stream.h"

namespace fusedpo::cuda {

// Rows in the order of the flattened leading dimensions, each a run of neighbouring values. Leading
// dimensions may have any strides (0 too), so logits[:, :-1] is read where it lies. Dimensions that
// step alike are merged; more than kMaxLeading after that need a copy first.
constexpr int kMaxLeading = 4;

struct RowLayout {
  int dims = 1;                       // leading dimensions, the last one varying fastest
  int64_t size[kMaxLeading] = {0};    // their sizes
  int64_t stride[kMaxLeading] = {0};  // and strides, in elements

  // `row` is below 2^31, as every grid is: its divisions are 32 bits wide.
  FUSEDPO_HD int64_t offset(int64_t row) const {
    uint32_t rest = static_cast<uint32_t>(row);
    int64_t at = 0;
    for (int d = dims - 1; d > 0; --d) {
      const uint32_t n = static_cast<uint32_t>(size[d]), next = rest / n;
      at += static_cast<int64_t>(rest - next * n) * stride[d];
      rest = next;
    }
    return at + static_cast<int64_t>(rest) * stride[0];
  }
};

// Below, rows[i] = -1 means that there is no row i: it takes part in no sum, and counts as zeros.
// (Under graph capture the host does not know how many of `rows` are scored.)

// n rows of `cols` values of one type.
struct RowsView {
  void* data = nullptr;
  DType type = DType::f32;
  RowLayout layout;
  int64_t n = 0, cols = 0;
};

// The positions t in [0, count) whose label is not ignore_index, in order.
struct KeptRowsOut {
  int64_t* rows;  // [count]: rows[i] is the i-th scored position; -1 past them
  int64_t* slot;  // [count]: i with rows[i] = t, or -1
  int64_t* info;  // [2]: how many; the first position whose label is outside [0, vocab), or -1
};

// One launch of one block: labels are few. Labels outside [0, vocab) count as scored: their rows
// give NaN.
void find_kept_rows(const int64_t* labels, int64_t count, int64_t vocab, int64_t ignore_index,
                    const KeptRowsOut& out, Stream stream);

// to [n, C] dense of `type` = the rows rows[0..n) of `from`, rounded to `through` on the way; row
// numbers outside [0, from.n) give zeros. Null rows: the first n.
void gather_rows(const RowsView& from, const int64_t* rows, int64_t n, DType through, DType type,
                 void* to, Stream stream);

// to[i] = alpha * c[rows[i]] * from[i], n dense rows of C values, rounded to `type`. c holds fp32
// (fp64 where from_type is f64); null c: 1; null rows: i itself. alpha, one value of c's type on
// the device, may be null for 1.
void scale_rows(const void* from, DType from_type, const void* c, const int64_t* rows,
                const void* alpha, int64_t n, int64_t cols, DType type, void* to, Stream stream);

// to[t] = c[t] * from[slot[t]] (dense rows of the result type), 0 where slot[t] < 0. Null c: 1.
void scatter_rows(const void* from, DType from_type, const void* c, const int64_t* slot,
                  const RowsView& to, Stream stream);

// sum[i] += alpha * x[i] over `count` values of the result type; alpha as above.
void add_scaled(void* sum, const void* x, DType type, const void* alpha, int64_t count,
                Stream stream);

// out[v] (+)= alpha * sum_i c[rows[i]] d[i, v] over the rows i of d [n, cols] with row stride ld,
// in the order of i; out of the result type (fp32; fp64 where d_type is f64).
void sum_columns(const void* d, DType d_type, int64_t ld, const void* c, const int64_t* rows,
                 const void* alpha, int64_t n, int64_t cols, bool add, void* out, Stream stream);

// The power of two at or above max_i(|c[rows[i]]|, |h[rows[i]]|) in out[0], its inverse in out[1];
// both 1 where the maximum is 0 or not finite. c or h may be null. What an fp16 operand is divided
// by so that small upstream gradients stay in its range.
void find_gradient_scale(const void* c, const void* h, const int64_t* rows, int64_t n,
                         DType result_type, void* out, Stream stream);

}  // namespace fusedpo::cuda
