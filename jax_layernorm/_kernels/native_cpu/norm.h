// The norm of a matrix, forward and backward. It splits the rows into chunks for the
// threads, takes a parameter row for each group of rows, and sums over rows in a fixed
// order.

#ifndef JAX_LAYERNORM_KERNELS_NATIVE_CPU_NORM_H_
#define JAX_LAYERNORM_KERNELS_NATIVE_CPU_NORM_H_

#include <cstdint>

#include "rows.h"
#include "threads.h"

namespace jax_layernorm {

// An array; the data is null if the problem has no such array. A parameter has one row of
// features for each of `groups` equal groups of consecutive rows.
struct In {
  const void* data = nullptr;
  Dtype dtype = kFloat32;
  int64_t groups = 1;
};
struct Out {
  void* data = nullptr;
  Dtype dtype = kFloat32;
  int64_t groups = 1;
};

struct ForwardProblem {
  bool center;  // true for layer norm, false for RMS norm
  // Rounds x_hat to the dtype of what is normalized, and gamma to that of scale.
  bool round_before_scale;
  // Whether x_hat * gamma, and the sum of that and the bias, are then rounded like x_hat.
  bool round_product, round_sum;
  int64_t rows, features;
  double epsilon, scale_offset;
  In x, residual, scale, bias;
  Out y, residual_out, mean, mean_low, rstd;
};

struct BackwardProblem {
  bool center, round_before_scale;
  int64_t rows, features;
  double scale_offset;
  In x, scale, mean, mean_low, rstd, dy, dresidual_out, dmean, drstd;
  Out dx, dscale, dbias;
};

// The dtype of the sum of two arrays, by JAX's promotion rules.
inline Dtype promoted(Dtype a, Dtype b) {
  if (a == b) return a;
  return a == kFloat64 || b == kFloat64 ? kFloat64 : kFloat32;
}

// The dtype of the statistics and of the arithmetic.
inline Dtype computed(Dtype x) { return x == kFloat64 ? kFloat64 : kFloat32; }

// The row kernels for the widest vectors that this processor has.
const RowKernels& best_kernels();

// Returns false if memory ran out. The results depend on the problem and the kernels, but
// not on the number of threads. The bits of a row's y, statistics and dx do not depend on
// the other rows either.
bool run(const ForwardProblem& problem, const RowKernels& kernels, Pool& pool);
bool run(const BackwardProblem& problem, const RowKernels& kernels, Pool& pool);

}  // namespace jax_layernorm

#endif  // JAX_LAYERNORM_KERNELS_NATIVE_CPU_NORM_H_
