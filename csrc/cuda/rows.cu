// Rows moved, scaled, converted and summed. All of it is bound by memory: every value is read once
// and written once, 16 bytes at a time where both sides are aligned.
#include "cuda/rows.h"

#include "cuda/row.cuh"
#include "cuda/row_results.cuh"

namespace fusedpo::cuda {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kRun = 4;  // neighbouring values that a thread moves at once

template <typename T>
struct alignas(kRun * sizeof(T) < 16 ? kRun * sizeof(T) : 16) Run {
  T value[kRun];
};

template <typename T>
__device__ inline bool holds_runs(const T* p, int64_t cols) {
  return cols % kRun == 0 && reinterpret_cast<uintptr_t>(p) % alignof(Run<T>) == 0;
}

struct Move {
  RowsView from, to;
  const int64_t* source;   // [to.n]: the row of `from` that a row of `to` is made of; null: its own
  const void* c;           // coefficients or null
  const int64_t* c_index;  // [to.n]: which one a row of `to` takes; null: its own
  const void* alpha;
  DType through;
};

__device__ inline double through_type(double x, DType) { return x; }

__device__ inline float through_type(float x, DType type) {
  if (type == DType::bf16) {
    bf16 rounded;
    from_float(x, &rounded);
    return to_float(rounded);
  }
  if (type == DType::f16) {
    f16 rounded;
    from_float(x, &rounded);
    return to_float(rounded);
  }
  return x;
}

// Grid: one block for each row of `to`; rows without a source or a coefficient become zeros.
template <typename From, typename To>
__global__ void __launch_bounds__(kThreads) move(const __grid_constant__ Move args) {
  using C = Compute<From>;
  const int64_t row = blockIdx.x;
  const int64_t source = args.source == nullptr ? row : args.source[row];
  const int64_t at = args.c_index == nullptr ? row : args.c_index[row];
  const int64_t cols = args.to.cols;
  To* const to = static_cast<To*>(args.to.data) + args.to.layout.offset(row);
  if (source < 0 || source >= args.from.n || at < 0) {
    for (int64_t v = threadIdx.x; v < cols; v += kThreads) to[v] = To{};
    return;
  }
  C factor = 1;
  if (args.c != nullptr) factor = static_cast<C>(value_at<C>(args.c, at, 1.0));
  factor *= static_cast<C>(value_at<C>(args.alpha, 0, 1.0));

  const From* const from =
      static_cast<const From*>(args.from.data) + args.from.layout.offset(source);
  const auto convert = [&](From x) {
    To out;
    from_float(factor * through_type(static_cast<C>(to_float(x)), args.through), &out);
    return out;
  };
  if (holds_runs(from, cols) && holds_runs(static_cast<const To*>(to), cols)) {
#pragma unroll 4
    for (int64_t v = threadIdx.x; v < cols / kRun; v += kThreads) {
      const Run<From> in = reinterpret_cast<const Run<From>*>(from)[v];
      Run<To> out;
#pragma unroll
      for (int j = 0; j < kRun; ++j) out.value[j] = convert(in.value[j]);
      reinterpret_cast<Run<To>*>(to)[v] = out;
    }
  } else {
    for (int64_t v = threadIdx.x; v < cols; v += kThreads) to[v] = convert(from[v]);
  }
}

template <typename From>
void move_from(const Move& args, Stream stream) {
  const dim3 grid(static_cast<unsigned>(args.to.n)), block(kThreads);
  switch (args.to.type) {
    case DType::bf16:
      return launch(move<From, bf16>, grid, block, stream, args);
    case DType::f16:
      return launch(move<From, f16>, grid, block, stream, args);
    default:
      return launch(move<From, float>, grid, block, stream, args);
  }
}

void move_rows(const Move& args, Stream stream) {
  if (args.to.n == 0) return;
  switch (args.from.type) {
    case DType::f32:
      return move_from<float>(args, stream);
    case DType::bf16:
      return move_from<bf16>(args, stream);
    case DType::f16:
      return move_from<f16>(args, stream);
    case DType::f64:
      return launch(move<double, double>, dim3(static_cast<unsigned>(args.to.n)), dim3(kThreads),
                    stream, args);
  }
}

RowsView dense_rows(const void* data, DType type, int64_t n, int64_t cols) {
  RowsView view{const_cast<void*>(data), type, {}, n, cols};
  view.layout.size[0] = n;
  view.layout.stride[0] = cols;
  return view;
}

template <typename R>
__global__ void __launch_bounds__(kThreads)
    add(R* sum, const R* x, const void* alpha, int64_t count) {
  constexpr int kPer = kPerVector<R>;
  const R factor = static_cast<R>(value_at<R>(alpha, 0, 1.0));
  const int64_t first = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t step = gridDim.x * int64_t{kThreads};
  int64_t vectors = count / kPer;
  if ((reinterpret_cast<uintptr_t>(sum) | reinterpret_cast<uintptr_t>(x)) % 16 != 0) vectors = 0;
  for (int64_t i = first; i < vectors; i += step) {
    R a[kPer], b[kPer];
    unpack<R>(load_words_last(sum + i * kPer), a);
    unpack<R>(load_words_last(x + i * kPer), b);
#pragma unroll
    for (int j = 0; j < kPer; ++j) a[j] += factor * b[j];
    store_words(sum + i * kPer, pack_all<R>(a));
  }
  for (int64_t i = vectors * kPer + first; i < count; i += step) sum[i] += factor * x[i];
}

struct ColumnArgs {
  const void* d;
  const void* c;
  const int64_t* rows;
  const void* alpha;
  int64_t ld, n, cols;
  bool add;
  void* out;
};

// Grid: a thread for each column; a warp reads neighbouring values of one row. Runs of kRows rows
// are summed in the compute type, runs in fp64.
template <typename T>
__global__ void __launch_bounds__(kThreads) sum_column(const __grid_constant__ ColumnArgs args) {
  using R = Compute<T>;
  constexpr int kRows = 8;
  const int64_t v = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (v >= args.cols) return;
  const T* const d = static_cast<const T*>(args.d) + v;
  const auto term = [&](int64_t i) {
    const int64_t at = args.rows == nullptr ? i : args.rows[i];
    if (at < 0) return R(0);
    const R c = args.c == nullptr ? R(1) : static_cast<const R*>(args.c)[at];
    return c * static_cast<R>(to_float(d[i * args.ld]));
  };
  double sum = 0.0;
  int64_t i = 0;
  for (; i + kRows <= args.n; i += kRows) {
    R part = 0;
#pragma unroll
    for (int r = 0; r < kRows; ++r) part += term(i + r);
    sum += part;
  }
  for (; i < args.n; ++i) sum += term(i);
  R* const out = static_cast<R*>(args.out) + v;
  *out = static_cast<R>(value_at<R>(args.alpha, 0, 1.0) * sum +
                        (args.add ? static_cast<double>(*out) : 0.0));
}

unsigned blocks_for(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return static_cast<unsigned>(blocks < INT32_MAX ? blocks : INT32_MAX);
}

}  // namespace

void gather_rows(const RowsView& from, const int64_t* rows, int64_t n, DType through, DType type,
                 void* to, Stream stream) {
  move_rows({from, dense_rows(to, type, n, from.cols), rows, nullptr, nullptr, nullptr, through},
            stream);
}

void scale_rows(const void* from, DType from_type, const void* c, const int64_t* rows,
                const void* alpha, int64_t n, int64_t cols, DType type, void* to, Stream stream) {
  move_rows({dense_rows(from, from_type, n, cols), dense_rows(to, type, n, cols), nullptr, c, rows,
             alpha, from_type},
            stream);
}

void scatter_rows(const void* from, DType from_type, const void* c, const int64_t* slot,
                  const RowsView& to, Stream stream) {
  // Slots count the rows of `from`, and none lies past them.
  move_rows({dense_rows(from, from_type, to.n, to.cols), to, slot, c, nullptr, nullptr, from_type},
            stream);
}

void add_scaled(void* sum, const void* x, DType type, const void* alpha, int64_t count,
                Stream stream) {
  if (count == 0) return;
  const int64_t per_thread = type == DType::f64 ? 2 : 4;
  const dim3 grid(blocks_for((count + per_thread - 1) / per_thread)), block(kThreads);
  if (type == DType::f64) {
    launch(add<double>, grid, block, stream, static_cast<double*>(sum),
           static_cast<const double*>(x), alpha, count);
  } else {
    launch(add<float>, grid, block, stream, static_cast<float*>(sum), static_cast<const float*>(x),
           alpha, count);
  }
}

void sum_columns(const void* d, DType d_type, int64_t ld, const void* c, const int64_t* rows,
                 const void* alpha, int64_t n, int64_t cols, bool add, void* out, Stream stream) {
  if (cols == 0) return;
  const ColumnArgs args{d, c, rows, alpha, ld, n, cols, add, out};
  const dim3 grid(blocks_for(cols)), block(kThreads);
  switch (d_type) {
    case DType::f32:
      return launch(sum_column<float>, grid, block, stream, args);
    case DType::bf16:
      return launch(sum_column<bf16>, grid, block, stream, args);
    case DType::f16:
      return launch(sum_column<f16>, grid, block, stream, args);
    case DType::f64:
      return launch(sum_column<double>, grid, block, stream, args);
  }
}

}  // namespace fusedpo::cuda
