// The kernels for runs of rows, compiled once for each instruction set.

#ifndef JAX_LAYERNORM_NATIVE_CPU_ROWS_H_
#define JAX_LAYERNORM_NATIVE_CPU_ROWS_H_

#include <cstdint>

namespace jax_layernorm {

enum Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64, kDtypes };

constexpr int kBytesOf[kDtypes] = {4, 2, 2, 8};

// Statistics and arithmetic: float64 where what is normalized is float64, else float32.
// Pointers named without a dtype are to that type; null where there is no such array.

// A sum over rows, of float32 terms, is a row of float64; of float64 terms, a row of them
// and then a row of what their roundings lost. The rows are padded to whole registers.
constexpr int64_t kSumWords[2] = {1, 2};
constexpr int64_t kPadding = 16;

struct ForwardRows {
  int64_t rows, features;
  double epsilon;
  const void* x;  // the first of the rows, as of all arrays here
  const void* gamma;
  const void* bias;
  void* y;
  void *mean, *mean_low, *rstd;
};

struct BackwardRows {
  int64_t rows, features;
  const void* x;
  const void* dy;
  const void* dtotal;  // dtype of x
  const void* gamma;
  const void *mean, *mean_low, *rstd, *dmean, *drstd;
  void* dx;
  double *dscale, *dbias;  // sums over rows, added to; see kSumWords
  int64_t padded;          // features, rounded up to a multiple of kPadding
};

struct RowKernels {
  const char* name;
  // By layer norm (1) or RMS norm (0), dtype of x, dtype of y or dy.
  void (*forward[2][kDtypes][kDtypes])(const ForwardRows&);
  void (*backward[2][kDtypes][kDtypes])(const BackwardRows&);
  // total = residual + x, rounded to the total's dtype; by dtypes of x and residual.
  void (*add[kDtypes][kDtypes])(const void* x, const void* residual, void* total,
                                int64_t n);
  // to = from + offset; by whether the arithmetic is in float64, and the dtype of from.
  void (*widen[2][kDtypes])(const void* from, double offset, void* to, int64_t n);
  // The total of n columns of `count` sums over rows, one after the other, rounded to the
  // dtype of the arithmetic; by whether that is float64.
  void (*sum[2])(const double* from, int64_t count, int64_t padded, void* to, int64_t n);
};

extern const RowKernels kBaselineKernels;
#if defined(__x86_64__)
extern const RowKernels kAvx2Kernels;
extern const RowKernels kAvx512Kernels;
#endif

// Rows of up to so many features are taken several at a time, forward: these and their
// results stay in the first-level cache.
constexpr int64_t kShortRow = 1024;
// Likewise backward, where several rows of x and dy are read a second time from the
// second-level cache.
constexpr int64_t kCachedBytes = 512 * 1024;

}  // namespace jax_layernorm

#endif  // JAX_LAYERNORM_NATIVE_CPU_ROWS_H_
