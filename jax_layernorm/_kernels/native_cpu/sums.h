// Sums along rows and over rows, in a fixed order.
//
// A sum along a row adds kBlock terms in each lane of a vector, and then adds these blocks
// in vectors of float64. A sum over rows adds a few rows in the dtype of the arithmetic, and
// then adds these sums in about twice its precision.

#ifndef JAX_LAYERNORM_KERNELS_NATIVE_CPU_SUMS_H_
#define JAX_LAYERNORM_KERNELS_NATIVE_CPU_SUMS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace jax_layernorm {
namespace {

constexpr int kBlock = 32;

// Calls step(i, Whole{}) for each whole register of elements from begin to end, and
// step(i, Part{n}) for the n elements that are left.
template <class C, class Step>
JLN_INLINE void for_each(int64_t begin, int64_t end, Step step) {
  constexpr int N = kLanes<C>;
  int64_t i = begin;
  for (; i + N <= end; i += N) step(i, Whole{});
  if (i < end) step(i, Part{static_cast<int>(end - i)});
}

// A sum in float64 with as many lanes as a register of C: two registers for float32, one
// for float64.
template <class C>
struct WideSum {
  Register<double> parts[sizeof(double) / sizeof(C)] = {};

  JLN_INLINE void add(Register<C> v) {
    constexpr int N = kLanes<double>;
    struct { Vector<C, N> part[sizeof(double) / sizeof(C)]; } split;
    std::memcpy(&split, &v, sizeof v);
    for (size_t i = 0; i < sizeof(double) / sizeof(C); ++i) {
      parts[i] += __builtin_convertvector(split.part[i], Register<double>);
    }
  }
  JLN_INLINE double total() const {
    Register<double> sum = parts[0];
    if constexpr (sizeof(C) < sizeof(double)) sum += parts[1];
    return sum_of_lanes<double, kLanes<double>>(sum);
  }
};

// Takes S sums along each of R rows. accumulate(i, which, sums) adds the terms of the
// register at element i of each row to the vectors sums[row][s]. There are U sets of these
// vectors, which take turns so that one addition does not wait for the one before.
template <int R, int U, int S, class C, class Accumulate>
JLN_INLINE void row_sums(int64_t features, double (&totals)[S][R], C,
                         Accumulate accumulate) {
  constexpr int N = kLanes<C>;
  WideSum<C> wide[R][S];
  constexpr int64_t block = kBlock * U * N;
  for (int64_t begin = 0; begin < features; begin += block) {
    const int64_t end = features - begin < block ? features : begin + block;
    Register<C> sums[U][R][S] = {};
    int64_t i = begin;
    for (; i + U * N <= end; i += U * N) {
      for (int u = 0; u < U; ++u) accumulate(i + u * N, Whole{}, sums[u]);
    }
    for_each<C>(i, end, [&](int64_t j, auto which) { accumulate(j, which, sums[0]); });
    for (int s = 0; s < S; ++s) {
      for (int k = 0; k < R; ++k) {
        for (int step = 1; step < U; step *= 2) {
          for (int u = 0; u + step < U; u += 2 * step) sums[u][k][s] += sums[u + step][k][s];
        }
        if (begin == 0 && end == features) {  // a short row, which float64 would slow down
          totals[s][k] = sum_of_lanes<C, N>(sums[0][k][s]);
        } else {
          wide[k][s].add(sums[0][k][s]);
        }
      }
    }
    if (begin == 0 && end == features) return;
  }
  for (int s = 0; s < S; ++s) {
    for (int k = 0; k < R; ++k) totals[s][k] = wide[k][s].total();
  }
}

// The rounding error of a + b (Knuth's two-sum), whichever of the two is larger.
JLN_INLINE Register<double> two_sum_error(Register<double> a, Register<double> b) {
  const auto sum = a + b, b_there = sum - a;
  return (a - (sum - b_there)) + (b - b_there);
}

template <class V, int R>
JLN_INLINE V sum_of(const V* v) {
  if constexpr (R == 1) return v[0];
  else return sum_of<V, R / 2>(v) + sum_of<V, R - R / 2>(v + R / 2);
}

// Adds a register to a sum over rows, at the columns from *sums on. The lanes beyond the
// last feature are 0, and the sums are padded to have room for them (kPadding).
template <class C>
JLN_INLINE void accumulate(double* sums, int64_t padded, Register<C> v) {
  using D = Register<double>;
  if constexpr (std::is_same_v<C, float>) {
    (void)padded;
    WideSum<C> sum;
    std::memcpy(&sum.parts, sums, sizeof sum.parts);
    sum.add(v);
    std::memcpy(sums, &sum.parts, sizeof sum.parts);
  } else {
    const D high = load<double>(sums, Whole{});
    const D low = load<double>(sums + padded, Whole{}) + two_sum_error(high, v);
    store<double>(sums, high + v, Whole{});
    store<double>(sums + padded, low, Whole{});
  }
}

}  // namespace
}  // namespace jax_layernorm

#endif  // JAX_LAYERNORM_KERNELS_NATIVE_CPU_SUMS_H_
