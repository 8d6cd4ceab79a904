// The formulas of _equations.py for runs of rows, in vectors of the instruction set
// that this file is compiled for; JLN_KERNELS names the table it defines.
//
// A row is read from memory once: what a later pass over it needs is still in the cache.
// Sums run in several vectors of partial sums over at most kBlock elements, in a fixed
// order, and over the blocks in float64.

#include <cmath>
#include <type_traits>

#include "native_cpu_rows.h"
#include "native_cpu_simd.h"

namespace jax_layernorm {
namespace {

constexpr int64_t kBlock = 4096;

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls step(i, Whole{}) for each whole register of elements in begin .. end, and
// step(i, Part{n}) for what is left.
template <class C, class Step>
JLN_INLINE void for_each(int64_t begin, int64_t end, Step step) {
  constexpr int N = kLanes<C>;
  int64_t i = begin;
  for (; i + N <= end; i += N) step(i, Whole{});
  if (i < end) step(i, Part{static_cast<int>(end - i)});
}

// The sum over a row of term(i, which), a register of terms.
template <class C, class Term>
JLN_INLINE C sum_over(int64_t features, Term term) {
  using V = Register<C>;
  constexpr int N = kLanes<C>;
  double total = 0;
  for (int64_t begin = 0; begin < features; begin += kBlock) {
    const int64_t end = features - begin < kBlock ? features : begin + kBlock;
    V sums[4] = {};
    int64_t i = begin;
    for (; i + 4 * N <= end; i += 4 * N) {
      for (int k = 0; k < 4; ++k) sums[k] += term(i + k * N, Whole{});
    }
    for_each<C>(i, end, [&](int64_t j, auto which) { sums[0] += term(j, which); });
    total += sum_of_lanes<C, N>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  return static_cast<C>(total);
}

template <class X, class Y, bool kCenter>
void forward(const ForwardRows& a) {
  using C = Compute<X>;
  using V = Register<C>;
  const int64_t features = a.features;
  const C share = static_cast<C>(1.0 / static_cast<double>(features));
  const auto* gamma = static_cast<const C*>(a.gamma);
  const auto* bias = static_cast<const C*>(a.bias);
  for (int64_t row = 0; row < a.rows; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * features;
    Y* y = static_cast<Y*>(a.y) + row * features;
    C mean = 0, correction = 0;
    if constexpr (kCenter) {
      mean = sum_over<C>(features, [&](int64_t i, auto which) {
        return load<C>(x + i, which) * all<V>(share);
      });
      correction = sum_over<C>(features, [&](int64_t i, auto which) {
        const V c = load<C>(x + i, which) - all<V>(mean);
        return only<C>(c, which) * all<V>(share);
      });
    }
    const auto deviation = [&](int64_t i, auto which) {
      V c = load<C>(x + i, which);
      if constexpr (kCenter) c = (c - all<V>(mean)) - all<V>(correction);
      return c;
    };
    const C square = sum_over<C>(features, [&](int64_t i, auto which) {
      const V c = only<C>(deviation(i, which), which);
      return c * c;
    });
    const double variance = static_cast<double>(square * share);
    const C rstd = static_cast<C>(1.0 / std::sqrt(variance + a.epsilon));
    for_each<C>(0, features, [&](int64_t i, auto which) {
      V v = deviation(i, which) * all<V>(rstd);
      if (gamma != nullptr) v = v * load<C>(gamma + i, which);
      if (bias != nullptr) v = v + load<C>(bias + i, which);
      store<C>(y + i, v, which);
    });
    if (a.rstd != nullptr) {
      if constexpr (kCenter) {
        const C high = mean + correction;  // two words, as _equations._two_sum
        static_cast<C*>(a.mean)[row] = high;
        static_cast<C*>(a.mean_low)[row] = (mean - high) + correction;
      }
      static_cast<C*>(a.rstd)[row] = rstd;
    }
  }
}

// R rows together, so that gamma, dscale and dbias are loaded once for all of them.
template <class X, class DY, bool kCenter, int R>
JLN_INLINE void backward_together(const BackwardRows& a, int64_t row) {
  using C = Compute<X>;
  using V = Register<C>;
  const int64_t features = a.features;
  const C share = static_cast<C>(1.0 / static_cast<double>(features));
  const auto* gamma = static_cast<const C*>(a.gamma);
  auto* dscale = static_cast<C*>(a.dscale);
  auto* dbias = static_cast<C*>(a.dbias);
  const X* x = static_cast<const X*>(a.x) + row * features;
  const DY* dy = static_cast<const DY*>(a.dy) + row * features;
  C mean[R] = {}, low[R] = {}, rstd[R];
  for (int k = 0; k < R; ++k) {
    if constexpr (kCenter) {
      mean[k] = static_cast<const C*>(a.mean)[row + k];
      low[k] = static_cast<const C*>(a.mean_low)[row + k];
    }
    rstd[k] = static_cast<const C*>(a.rstd)[row + k];
  }
  const auto x_hat = [&](int k, int64_t i, auto which) {
    V c = load<C>(x + k * features + i, which);
    if constexpr (kCenter) c = (c - all<V>(mean[k])) - all<V>(low[k]);
    return c * all<V>(rstd[k]);
  };

  double sum_g[R] = {}, sum_g_x_hat[R] = {};
  for (int64_t begin = 0; begin < features; begin += kBlock) {
    const int64_t end = features - begin < kBlock ? features : begin + kBlock;
    V g_sums[R] = {}, g_x_hat_sums[R] = {};
    for_each<C>(begin, end, [&](int64_t i, auto which) {
      V scale_sum{}, bias_sum{};
      V factor = all<V>(C{1});
      if (gamma != nullptr) factor = load<C>(gamma + i, which);
      if (dscale != nullptr) scale_sum = load<C>(dscale + i, which);
      if (dbias != nullptr) bias_sum = load<C>(dbias + i, which);
      for (int k = 0; k < R; ++k) {
        const V h = only<C>(x_hat(k, i, which), which);
        const V d = load<C>(dy + k * features + i, which);
        const V g = d * factor;
        if constexpr (kCenter) g_sums[k] += g;
        g_x_hat_sums[k] += g * h;
        scale_sum += d * h;
        bias_sum += d;
      }
      if (dscale != nullptr) store<C>(dscale + i, scale_sum, which);
      if (dbias != nullptr) store<C>(dbias + i, bias_sum, which);
    });
    for (int k = 0; k < R; ++k) {
      sum_g[k] += sum_of_lanes<C, kLanes<C>>(g_sums[k]);
      sum_g_x_hat[k] += sum_of_lanes<C, kLanes<C>>(g_x_hat_sums[k]);
    }
  }

  for (int k = 0; k < R; ++k) {
    C along_x_hat = static_cast<C>(sum_g_x_hat[k]);
    if (a.drstd != nullptr) {
      along_x_hat += rstd[k] * static_cast<const C*>(a.drstd)[row + k];
    }
    along_x_hat *= share;
    const C mean_g = static_cast<C>(sum_g[k]) * share;
    C dmean = 0;
    if (a.dmean != nullptr) dmean = static_cast<const C*>(a.dmean)[row + k] * share;
    const int64_t first_element = (row + k) * features;
    const X* dtotal = static_cast<const X*>(a.dtotal) + first_element;
    X* dx = static_cast<X*>(a.dx) + first_element;
    for_each<C>(0, features, [&](int64_t i, auto which) {
      V g = load<C>(dy + k * features + i, which);
      if (gamma != nullptr) g = g * load<C>(gamma + i, which);
      V v = g - x_hat(k, i, which) * all<V>(along_x_hat);
      if constexpr (kCenter) v = v - all<V>(mean_g);
      v = all<V>(rstd[k]) * v;
      if constexpr (kCenter) v = v + all<V>(dmean);
      if (a.dtotal != nullptr) v = v + load<C>(dtotal + i, which);
      store<C>(dx + i, v, which);
    });
  }
}

template <class X, class DY, bool kCenter>
void backward(const BackwardRows& a) {
  int64_t row = 0;
  if constexpr (std::is_same_v<X, DY>) {  // the usual case; the others stay small
    constexpr int kTogether = 4;
    const int64_t row_bytes = a.features * int64_t{sizeof(X) + sizeof(DY)};
    if (kTogether * row_bytes <= kCachedBytes) {
      for (; row + kTogether <= a.rows; row += kTogether) {
        backward_together<X, DY, kCenter, kTogether>(a, row);
      }
    }
  }
  for (; row < a.rows; ++row) backward_together<X, DY, kCenter, 1>(a, row);
}

template <class X, class Residual>
void add(const void* x, const void* residual, void* total, int64_t n) {
  // The promoted dtype, by JAX's rules: of two half-precision dtypes, float32.
  using Total = std::conditional_t<
      std::is_same_v<X, Residual>, X,
      std::conditional_t<std::is_same_v<X, double> || std::is_same_v<Residual, double>,
                         double, float>>;
  using C = Compute<Total>;
  for_each<C>(0, n, [&](int64_t i, auto which) {
    const auto sum = load<C>(static_cast<const Residual*>(residual) + i, which) +
                     load<C>(static_cast<const X*>(x) + i, which);
    store<C>(static_cast<Total*>(total) + i, sum, which);
  });
}

template <class C, class T>
void widen(const void* from, double offset, void* to, int64_t n) {
  using V = Register<C>;
  const C added = static_cast<C>(offset);
  for_each<C>(0, n, [&](int64_t i, auto which) {
    const V v = load<C>(static_cast<const T*>(from) + i, which);
    store<C>(static_cast<C*>(to) + i, added == 0 ? v : v + all<V>(added), which);
  });
}

template <class C>
void sum(const void* from, int64_t count, int64_t stride, void* to, int64_t n) {
  for_each<double>(0, n, [&](int64_t i, auto which) {
    Register<double> sums{};
    for (int64_t k = 0; k < count; ++k) {
      sums += load<double>(static_cast<const C*>(from) + k * stride + i, which);
    }
    store<double>(static_cast<C*>(to) + i, sums, which);
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
