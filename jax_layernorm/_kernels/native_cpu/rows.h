// The kernels for consecutive rows, compiled once for each instruction set.

#ifndef JAX_LAYERNORM_KERNELS_NATIVE_CPU_ROWS_H_
#define JAX_LAYERNORM_KERNELS_NATIVE_CPU_ROWS_H_

#include <cstdint>

namespace jax_layernorm {

enum Dtype : int { kFloat32, kBFloat16, kFloat16, kFloat64, kDtypes };

constexpr int kBytesOf[kDtypes] = {4, 2, 2, 8};

// The arithmetic, the statistics and the parameters below have the same dtype: float64 if
// the normalized array is float64, and float32 otherwise. Pointers without a comment point
// to that dtype, and x, y, dy and dx to their own. A pointer is null if the problem has no
// such array.

// A sum of float32 terms over rows is stored as one row of float64. A sum of float64 terms
// is stored as one row of sums and a second row of the rounding errors of these sums. The
// rows are padded to whole registers.
constexpr int64_t kSumWords[2] = {1, 2};
constexpr int64_t kPadding = 16;

struct ForwardRows {
  int64_t rows, features;
  double epsilon;
  const void* x;  // points to the first of the rows, like all pointers here
  const void* gamma;
  const void* bias;
  void* y;
  void *mean, *mean_low, *rstd;
  // Whether x_hat is rounded to the dtype of x, and then the results after it. Nothing is
  // rounded if x does not have half precision.
  bool round_x_hat, round_product, round_sum;
};

struct BackwardRows {
  int64_t rows, features;
  const void* x;
  const void* dy;
  const void* dresidual_out;  // has the dtype of x
  const void* gamma;
  const void *mean, *mean_low, *rstd, *dmean, *drstd;
  void* dx;  // null if it is not wanted
  double *dscale, *dbias;  // sums over rows, to which the kernel adds; see kSumWords
  int64_t padded;          // features, rounded up to a multiple of kPadding
  bool round_x_hat;        // for dscale, as in the forward pass
};

struct RowKernels {
  const char* name;
  // Indexed by RMS norm (0) or layer norm (1), the dtype of x, and the dtype of y or dy.
  void (*forward[2][kDtypes][kDtypes])(const ForwardRows&);
  void (*backward[2][kDtypes][kDtypes])(const BackwardRows&);
  // residual_out = residual + x, rounded to the dtype of residual_out. Indexed by the
  // dtypes of x and residual.
  void (*add[kDtypes][kDtypes])(const void* x, const void* residual, void* residual_out,
                                int64_t n);
  // to = from + offset, rounded to the dtype of `from` if `round`. Indexed by whether the
  // arithmetic is in float64 (1) or float32 (0), and by the dtype of `from`.
  void (*widen[2][kDtypes])(const void* from, double offset, bool round, void* to,
                            int64_t n);
  // Adds up `count` sums over rows, which are stored one after the other, in n columns, and
  // rounds to the dtype of the arithmetic. Indexed by whether that is float64.
  void (*sum[2])(const double* from, int64_t count, int64_t padded, void* to, int64_t n);
};

extern const RowKernels kBaselineKernels;
#if defined(__x86_64__)
extern const RowKernels kAvx2Kernels;
extern const RowKernels kAvx512Kernels;
#endif

// The forward pass takes several rows together if they have at most this many features,
// because the rows and their results then stay in the first-level cache.
constexpr int64_t kShortRow = 1024;
// The backward pass takes several rows together if their x and dy have at most this many
// bytes, because it then reads them a second time from the second-level cache.
constexpr int64_t kCachedBytes = 512 * 1024;

}  // namespace jax_layernorm

#endif  // JAX_LAYERNORM_KERNELS_NATIVE_CPU_ROWS_H_
