// The norm of a matrix, forward and backward: rows split into chunks for threads,
// parameters by groups of rows, sums over rows in a fixed order.

#ifndef JAX_LAYERNORM_NATIVE_CPU_NORM_H_
#define JAX_LAYERNORM_NATIVE_CPU_NORM_H_

#include <cstdint>

#include "rows.h"
#include "threads.h"

namespace jax_layernorm {

// An array: null data where there is none. A parameter has a row of features for each of
// `groups` equal runs of consecutive rows.
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

struct Forward {
  bool center;  // layer norm, or RMS norm
  int64_t rows, features;
  double epsilon, scale_offset;
  In x, residual, scale, bias;
  Out y, total, mean, mean_low, rstd;
};

struct Backward {
  bool center;
  int64_t rows, features;
  double scale_offset;
  In x, scale, mean, mean_low, rstd, dy, dtotal, dmean, drstd;
  Out dx, dscale, dbias;
};

// The dtype of the sum of two arrays: JAX's promotion.
inline Dtype promoted(Dtype a, Dtype b) {
  if (a == b) return a;
  return a == kFloat64 || b == kFloat64 ? kFloat64 : kFloat32;
}

// The dtype of statistics and arithmetic.
inline Dtype computed(Dtype x) { return x == kFloat64 ? kFloat64 : kFloat32; }

// The kernels for the widest vectors that this processor has.
const RowKernels& best_kernels();

// False: memory ran out. What is computed depends on the arguments and the kernels, and
// not on the number of threads.
bool run(const Forward& problem, const RowKernels& kernels, Pool& pool);
bool run(const Backward& problem, const RowKernels& kernels, Pool& pool);

}  // namespace jax_layernorm

#endif  // JAX_LAYERNORM_NATIVE_CPU_NORM_H_
