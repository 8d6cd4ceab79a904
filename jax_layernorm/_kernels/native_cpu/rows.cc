// The formulas of _equations.py for consecutive rows, in vectors of the instruction set
// that this file is compiled for. The macro JLN_KERNELS is the name of the table that the
// file defines.
//
// A row is read from memory once, because it is still in the cache when a later pass over
// it needs it.

#include <cmath>
#include <type_traits>

#include "rows.h"
#include "simd.h"
#include "sums.h"

namespace jax_layernorm {
namespace {

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// R rows together, because a short row alone would wait for its sums. The sums have U sets
// of vectors (see row_sums). Rows of one length must all have the same U, so that a row has
// the same bits whether it is taken alone or together with others.
template <class X, class Y, bool kCenter, int R, int U>
JLN_INLINE void forward_together(const ForwardRows& a, int64_t row) {
  using C = Compute<X>;
  using V = Register<C>;
  const int64_t features = a.features;
  const C inv_n = static_cast<C>(1.0 / static_cast<double>(features));
  const auto* gamma = static_cast<const C*>(a.gamma);
  const auto* bias = static_cast<const C*>(a.bias);
  const X* x = static_cast<const X*>(a.x) + row * features;
  Y* y = static_cast<Y*>(a.y) + row * features;

  C mean[R] = {}, low[R] = {}, rstd[R], shift[R] = {};
  if constexpr (kCenter) {
    double sums[1][R] = {};
    row_sums<R, U, 1>(features, sums, C{}, [&](int64_t i, auto which, V(*sum)[1]) {
      for (int k = 0; k < R; ++k) {
        const V v = load<C>(x + k * features + i, which);
        sum[k][0] = multiply_add(v, all<V>(inv_n), sum[k][0]);
      }
    });
    for (int k = 0; k < R; ++k) mean[k] = static_cast<C>(sums[0][k]);
  }
  double sums[2][R] = {};
  row_sums<R, U, 2>(features, sums, C{}, [&](int64_t i, auto which, V(*sum)[2]) {
    for (int k = 0; k < R; ++k) {
      __builtin_prefetch(y + k * features + i, 1);  // written next
      V c = load<C>(x + k * features + i, which);
      if constexpr (kCenter) {
        c = only<C>(c - all<V>(mean[k]), which);
        sum[k][1] += c;
      }
      sum[k][0] = multiply_add(c, c, sum[k][0]);
    }
  });
  const double count = static_cast<double>(features);
  // In a constant row, all elements differ from `mean` by the same few units in the last
  // place, and the average must be exactly that difference. For float64 only a division
  // gives it; for float32 the rounding from float64 does.
  const auto average = [&](double sum) {
    return std::is_same_v<C, double> ? sum / count : sum * (1.0 / count);
  };
  using Wide = std::conditional_t<std::is_same_v<C, double>, long double, double>;
  for (int k = 0; k < R; ++k) {
    double square = static_cast<C>(sums[0][k]);
    if constexpr (kCenter) {
      low[k] = static_cast<C>(average(sums[1][k]));
      const double less = square - count * low[k] * low[k];
      // If the square is infinite, `less` may be inf - inf, which is NaN.
      square = square == HUGE_VAL ? square : less < 0 ? 0 : less;
    }
    rstd[k] = static_cast<C>(Wide{1} / std::sqrt(Wide{average(square)} + a.epsilon));
    if constexpr (kCenter) {
      // This makes `mean` the element and `low` 0 in a constant row.
      const C high = mean[k] + low[k];
      low[k] = (mean[k] - high) + low[k];
      mean[k] = high;
      shift[k] = -low[k] * rstd[k];
    }
  }
  const auto write = [&](auto rounds) {
    for_each<C>(0, features, [&](int64_t i, auto which) {
      V factor{}, beta{};
      if (gamma != nullptr) factor = load<C>(gamma + i, which);
      if (bias != nullptr) beta = load<C>(bias + i, which);
      for (int k = 0; k < R; ++k) {
        __builtin_prefetch(x + (R + k) * features + i);  // the next rows
        V v = load<C>(x + k * features + i, which);
        // (x - mean - low) * rstd, with two roundings.
        if constexpr (kCenter) {
          v = multiply_add(v - all<V>(mean[k]), all<V>(rstd[k]), all<V>(shift[k]));
        } else {
          v = v * all<V>(rstd[k]);
        }
        if constexpr (decltype(rounds)::value) {
          v = round_to<X, C>(v);
          if (gamma != nullptr) v = v * factor;
          if (a.round_product) v = round_to<X, C>(v);
          if (bias != nullptr) v = v + beta;
          if (a.round_sum) v = round_to<X, C>(v);
        } else {
          if (gamma != nullptr && bias != nullptr) v = multiply_add(v, factor, beta);
          else if (gamma != nullptr) v = v * factor;
          else if (bias != nullptr) v = v + beta;
        }
        store<C>(y + k * features + i, v, which);
      }
    });
  };
  if (sizeof(X) == 2 && a.round_x_hat) write(std::bool_constant<sizeof(X) == 2>{});
  else write(std::false_type{});
  if (a.rstd != nullptr) {
    for (int k = 0; k < R; ++k) {
      if constexpr (kCenter) {
        static_cast<C*>(a.mean)[row + k] = mean[k];
        static_cast<C*>(a.mean_low)[row + k] = low[k];
      }
      static_cast<C*>(a.rstd)[row + k] = rstd[k];
    }
  }
}

constexpr int kTogether = 4;

template <class X, class Y, bool kCenter>
void forward(const ForwardRows& a) {
  int64_t row = 0;
  if constexpr (std::is_same_v<X, Y>) {  // the usual case; leave the others small
    if (a.features <= kShortRow) {
      for (; row + kTogether <= a.rows; row += kTogether) {
        forward_together<X, Y, kCenter, kTogether, 1>(a, row);
      }
      for (; row < a.rows; ++row) forward_together<X, Y, kCenter, 1, 1>(a, row);
    }
  }
  for (; row < a.rows; ++row) forward_together<X, Y, kCenter, 1, 4>(a, row);
}

// R rows together, because gamma, dscale and dbias are then loaded once for all of them.
// U is as in the forward pass.
template <class X, class DY, bool kCenter, int R, int U>
JLN_INLINE void backward_together(const BackwardRows& a, int64_t row) {
  using C = Compute<X>;
  using V = Register<C>;
  const int64_t features = a.features;
  const double inv_n = 1.0 / static_cast<double>(features);
  const auto* gamma = static_cast<const C*>(a.gamma);
  const X* x = static_cast<const X*>(a.x) + row * features;
  const DY* dy = static_cast<const DY*>(a.dy) + row * features;
  X* dx = a.dx == nullptr ? nullptr : static_cast<X*>(a.dx) + row * features;
  const X* written_next = dx == nullptr ? x : dx;
  C mean[R] = {}, shift[R] = {}, rstd[R];
  for (int k = 0; k < R; ++k) {
    rstd[k] = static_cast<const C*>(a.rstd)[row + k];
    if constexpr (kCenter) {
      mean[k] = static_cast<const C*>(a.mean)[row + k];
      shift[k] = -static_cast<const C*>(a.mean_low)[row + k] * rstd[k];
    }
  }
  const auto x_hat = [&](int k, int64_t i, auto which) {
    const V c = load<C>(x + k * features + i, which);
    if constexpr (kCenter) {
      return multiply_add(c - all<V>(mean[k]), all<V>(rstd[k]), all<V>(shift[k]));
    } else {
      return c * all<V>(rstd[k]);
    }
  };

  double sums[2][R] = {};
  const auto read = [&](auto rounds) {
    row_sums<R, U, 2>(features, sums, C{}, [&](int64_t i, auto which, V(*sum)[2]) {
      V factor = all<V>(C{1});
      if (gamma != nullptr) factor = load<C>(gamma + i, which);
      V d[R], along[R];
      for (int k = 0; k < R; ++k) {
        __builtin_prefetch(written_next + k * features + i, 1);
        const V h = only<C>(x_hat(k, i, which), which);
        d[k] = load<C>(dy + k * features + i, which);
        const V g = d[k] * factor;
        if constexpr (decltype(rounds)::value) along[k] = d[k] * round_to<X, C>(h);
        else along[k] = d[k] * h;
        sum[k][0] = multiply_add(g, h, sum[k][0]);
        if constexpr (kCenter) sum[k][1] += g;
      }
      if (a.dscale != nullptr) {
        accumulate<C>(a.dscale + i, a.padded, sum_of<V, R>(along));
      }
      if (a.dbias != nullptr) accumulate<C>(a.dbias + i, a.padded, sum_of<V, R>(d));
    });
  };
  if (sizeof(X) == 2 && a.round_x_hat) read(std::bool_constant<sizeof(X) == 2>{});
  else read(std::false_type{});
  if (dx == nullptr) return;

  for (int k = 0; k < R; ++k) {
    double sum_along = sums[0][k];
    if (a.drstd != nullptr) {
      sum_along += double{rstd[k]} * static_cast<const C*>(a.drstd)[row + k];
    }
    const C along_x_hat = static_cast<C>(sum_along * inv_n);
    // This is subtracted from g first, so that a constant g leaves exactly 0.
    const C mean_g = static_cast<C>(sums[1][k] * inv_n);
    C dmean_each = 0;  // what dmean adds to dx at each feature
    if (a.dmean != nullptr) {
      dmean_each = static_cast<C>(static_cast<const C*>(a.dmean)[row + k] * inv_n);
    }
    const X* dresidual_out = static_cast<const X*>(a.dresidual_out);
    if (dresidual_out != nullptr) dresidual_out += (row + k) * features;
    for_each<C>(0, features, [&](int64_t i, auto which) {
      __builtin_prefetch(x + (R + k) * features + i);  // the next rows
      __builtin_prefetch(dy + (R + k) * features + i);
      V g = load<C>(dy + k * features + i, which);
      if (gamma != nullptr) g = g * load<C>(gamma + i, which);
      if constexpr (kCenter) g = g - all<V>(mean_g);
      V v = multiply_add(-x_hat(k, i, which), all<V>(along_x_hat), g);
      if constexpr (kCenter) v = multiply_add(v, all<V>(rstd[k]), all<V>(dmean_each));
      else v = v * all<V>(rstd[k]);
      if (dresidual_out != nullptr) v = v + load<C>(dresidual_out + i, which);
      store<C>(dx + k * features + i, v, which);
    });
  }
}

template <class X, class DY, bool kCenter>
void backward(const BackwardRows& a) {
  int64_t row = 0;
  if constexpr (std::is_same_v<X, DY>) {  // the usual case; leave the others small
    const int64_t row_bytes = a.features * int64_t{sizeof(X) + sizeof(DY)};
    if (kTogether * row_bytes <= kCachedBytes) {
      for (; row + kTogether <= a.rows; row += kTogether) {
        backward_together<X, DY, kCenter, kTogether, 1>(a, row);
      }
      for (; row < a.rows; ++row) backward_together<X, DY, kCenter, 1, 1>(a, row);
    }
  }
  for (; row < a.rows; ++row) backward_together<X, DY, kCenter, 1, 2>(a, row);
}

template <class X, class Residual>
void add(const void* x, const void* residual, void* residual_out, int64_t n) {
  // The promoted dtype, by JAX's rules. Two different half-precision dtypes give float32.
  using Sum = std::conditional_t<
      std::is_same_v<X, Residual>, X,
      std::conditional_t<std::is_same_v<X, double> || std::is_same_v<Residual, double>,
                         double, float>>;
  using C = Compute<Sum>;
  for_each<C>(0, n, [&](int64_t i, auto which) {
    const auto sum = load<C>(static_cast<const Residual*>(residual) + i, which) +
                     load<C>(static_cast<const X*>(x) + i, which);
    store<C>(static_cast<Sum*>(residual_out) + i, sum, which);
  });
}

template <class C, class T>
void widen(const void* from, double offset, bool round, void* to, int64_t n) {
  using V = Register<C>;
  const C added = static_cast<C>(offset);
  for_each<C>(0, n, [&](int64_t i, auto which) {
    V v = load<C>(static_cast<const T*>(from) + i, which);
    if (added != 0) v = v + all<V>(added);
    if (round) v = round_to<T, C>(v);
    store<C>(static_cast<C*>(to) + i, v, which);
  });
}

template <class C>
void sum(const double* from, int64_t count, int64_t padded, void* to, int64_t n) {
  using D = Register<double>;
  constexpr int64_t kWords = kSumWords[std::is_same_v<C, double>];
  for_each<double>(0, n, [&](int64_t i, auto which) {
    D high{}, low{};
    for (int64_t k = 0; k < count; ++k) {
      const double* row = from + k * kWords * padded + i;
      if constexpr (kWords == 1) {
        high += load<double>(row, which);
      } else {
        const D v = load<double>(row, which);
        low += two_sum_error(high, v) + load<double>(row + padded, which);
        high += v;
      }
    }
    const D sum = high + low;
    // If the sum is infinite, `low` is NaN.
    store<double>(static_cast<C*>(to) + i, high - high == 0 ? sum : high, which);
  });
}

#define JLN_BY_Y(function, X, center)                                     \
  {                                                                       \
    function<X, float, center>, function<X, BFloat16, center>,            \
        function<X, Float16, center>, function<X, double, center>         \
  }
#define JLN_BY_X(function, center)                                        \
  {                                                                       \
    JLN_BY_Y(function, float, center), JLN_BY_Y(function, BFloat16, center), \
        JLN_BY_Y(function, Float16, center), JLN_BY_Y(function, double, center) \
  }
#define JLN_ADD(X) \
  { add<X, float>, add<X, BFloat16>, add<X, Float16>, add<X, double> }
#define JLN_WIDEN(C) \
  { widen<C, float>, widen<C, BFloat16>, widen<C, Float16>, widen<C, double> }

#if JLN_AVX512
constexpr const char* kName = "AVX-512";
#elif defined(__AVX2__)
constexpr const char* kName = "AVX2";
#elif defined(__SSE2__)
constexpr const char* kName = "SSE2";
#else
constexpr const char* kName = "128-bit vectors";
#endif

}  // namespace

const RowKernels JLN_KERNELS = {
    kName,
    {JLN_BY_X(forward, false), JLN_BY_X(forward, true)},
    {JLN_BY_X(backward, false), JLN_BY_X(backward, true)},
    {JLN_ADD(float), JLN_ADD(BFloat16), JLN_ADD(Float16), JLN_ADD(double)},
    {JLN_WIDEN(float), JLN_WIDEN(double)},
    {sum<float>, sum<double>},
};

}  // namespace jax_layernorm
