// The formulas of _equations.py for a matrix, rows by features, on NVIDIA GPUs. Each
// compilation makes one kernel for one problem. Macros describe both (`_macros` in
// __init__.py writes them):
//
//   JLN_FORWARD, JLN_BACKWARD or JLN_SUM_PARTS: which kernel
//   JLN_FEATURES, JLN_CLUSTER, JLN_THREADS, JLN_GROUPS, JLN_VECTOR, JLN_STAGES: see row.cuh
//   JLN_X, JLN_RESIDUAL, ...: the type of each array, float, bf16 or f16
//   JLN_HAS_RESIDUAL, ...: 0 or 1, whether there is that array
//   JLN_CENTER: 1 for layer norm, 0 for RMS norm
//   JLN_ROUND: 1 for round_before_scale
//   JLN_PRODUCT, JLN_SUM: the types to which it rounds x_hat * gamma, and the sum of that
//     and the bias
//   JLN_FETCH_FIRST: see FETCH_FIRST in _tiles.py
//   JLN_EPSILON, JLN_SCALE_OFFSET: floats
//
// Each row is read from memory once. Products and sums are fused only where the source says
// so (multiply_add), so that these kernels give the same bits on a CPU.

#ifdef JLN_EMULATED
#include "emulate.h"
#else
#include "gpu.cuh"
#endif

#if defined(JLN_FORWARD) || defined(JLN_BACKWARD)
#include "row.cuh"

constexpr bool kCenter = JLN_CENTER;
constexpr bool kHasScale = JLN_HAS_SCALE;
using X = JLN_X;
using Scale = JLN_SCALE;
constexpr float kLargest = 3.4028235e38f;

#if JLN_CLUSTER > 1
#define NORM_KERNEL CLUSTER_KERNEL(kBlock, kCluster)
#else
#define NORM_KERNEL KERNEL(kBlock)
#endif
#endif

#ifdef JLN_FORWARD
constexpr bool kHasResidual = JLN_HAS_RESIDUAL;
constexpr bool kHasBias = JLN_HAS_BIAS;
constexpr bool kHasStatistics = JLN_HAS_STATISTICS;
using Residual = JLN_RESIDUAL;
using ResidualOut = JLN_RESIDUAL_OUT;
using Bias = JLN_BIAS;
using Y = JLN_Y;
using Product = JLN_PRODUCT;
using Sum = JLN_SUM;

struct Shared {
  alignas(16) WarpSums sums;
  alignas(16) Arriving<X> x[kStages][kGroups];
  Arriving<Residual> residual[kStages][kGroups];  // last, because it may have no memory
};
constexpr int kSharedBytes =
    sizeof(Shared) - (kHasResidual ? 0 : sizeof(Shared::residual));

NORM_KERNEL norm_forward(const X* x, const Residual* residual, const Scale* scale,
                         const Bias* bias, Y* y, ResidualOut* residual_out, float* mean,
                         float* mean_low, float* rstd, long long rows) {
  Shared& shared = *reinterpret_cast<Shared*>(block_memory);
  const Place place;
  const int t = place.t, group = place.group, rank = place.rank;
  if constexpr (!kExact) {
    UNROLL for (int s = 0; s < kStages; ++s) {
      shared.x[s][group].zero(t);
      if constexpr (kHasResidual) shared.residual[s][group].zero(t);
    }
  }
  const auto fetch = [&](long long row, int stage) {
    if (row < rows) {
      shared.x[stage][group].fetch(place.part_of(x, row), t);
      if constexpr (kHasResidual) {
        shared.residual[stage][group].fetch(place.part_of(residual, row), t);
      }
    }
    async_commit();  // even of nothing, because groups are counted
  };
  long long row = place.first + group;
  UNROLL for (int s = 0; s < kStages - 1; ++s) fetch(row + s * place.step, s);

  begin_cluster(shared.sums);
  Values gamma, beta;
  if constexpr (kHasScale) {
    load_parameter(place.part_of(scale, 0), t, JLN_SCALE_OFFSET, gamma);
  }
  if constexpr (kHasBias) load_parameter(place.part_of(bias, 0), t, 0.0f, beta);

  // If rows share a warp, threads without a row still take part in its shuffles.
  int stage = 0, turn = 0;
  for (; kWarps ? row < rows : row - group < rows; row += place.step) {
    const bool here = kWarps || row < rows;
    async_wait<kStages - 2>();
    Values c;
    {
      Elements<X> arrived;
      shared.x[stage][group].read(arrived, t);
      FOR_ELEMENTS(v, i) c[v][i] = arrived.get(v, i);
    }
    if constexpr (kHasResidual) {
      Elements<Residual> other;
      Elements<ResidualOut> sum;
      shared.residual[stage][group].read(other, t);
      FOR_ELEMENTS(v, i) {
        sum.set(v, i, other.get(v, i) + c[v][i]);
        c[v][i] = sum.get(v, i);  // the sum as the caller gets it, rounded
      }
      if (here) sum.store_to(place.part_of(residual_out, row), t);
    }
    fetch(row + (kStages - 1) * place.step, before(stage));
    stage = stage + 1 == kStages ? 0 : stage + 1;

    Two sums = {0.0f, 0.0f};
    float high = 0.0f, low = 0.0f;
    if constexpr (kCenter) {
      FOR_ELEMENTS(v, i) sums.a = multiply_add(c[v][i], kInvN, sums.a);
      high = sum_row(sums, shared.sums, turn, group, t, rank).a;
      turn = kCluster > 1 ? turn + 1 & 3 : turn ^ 1;
      sums.a = 0.0f;
      FOR_ELEMENTS(v, i) {
        c[v][i] = inside(v, t) ? c[v][i] - high : 0.0f;
        sums.a += c[v][i];
      }
    }
    FOR_ELEMENTS(v, i) sums.b = multiply_add(c[v][i], c[v][i], sums.b);
    sums = sum_row(sums, shared.sums, turn, group, t, rank);
    turn = kCluster > 1 ? turn + 1 & 3 : turn ^ 1;
    float square = sums.b;
    if constexpr (kCenter) {
      low = sums.a * kInvN;
      // The limit is finite, because inf - inf would be NaN.
      square = fmaxf(square - fminf(low * low * kFeatures, kLargest), 0.0f);
    }
    const float r = inverse_root(multiply_add(square, kInvN, JLN_EPSILON));
    if (here) {
      Elements<Y> out;
      FOR_ELEMENTS(v, i) {
        float value = (c[v][i] - low) * r;
        if constexpr (kRound) {
          value = rounded<ResidualOut>(value);
          if constexpr (kHasScale) value = rounded<Product>(value * gamma[v][i]);
          if constexpr (kHasBias) value = rounded<Sum>(value + beta[v][i]);
        } else if constexpr (kHasScale && kHasBias) {
          value = multiply_add(value, gamma[v][i], beta[v][i]);
        } else if constexpr (kHasScale) {
          value *= gamma[v][i];
        } else if constexpr (kHasBias) {
          value += beta[v][i];
        }
        out.set(v, i, value);
      }
      out.store_to(place.part_of(y, row), t);
      if (kHasStatistics && t == 0 && rank == 0) {
        if constexpr (kCenter) {
          mean[row] = high;
          mean_low[row] = low;
        }
        rstd[row] = r;
      }
    }
  }
}
#endif

#ifdef JLN_BACKWARD
constexpr bool kHasDresidualOut = JLN_HAS_DRESIDUAL_OUT;
constexpr bool kHasDmean = JLN_HAS_DMEAN;
constexpr bool kHasDrstd = JLN_HAS_DRSTD;
constexpr bool kWithDx = JLN_WITH_DX;
constexpr bool kWithDscale = JLN_WITH_DSCALE;
constexpr bool kWithDbias = JLN_WITH_DBIAS;
constexpr bool kFetchFirst = JLN_FETCH_FIRST;
using Dy = JLN_DY;

struct Ring {
  Arriving<X> x[kStages][kGroups];
  Arriving<Dy> dy[kStages][kGroups];
  Arriving<X> dresidual_out[kStages][kGroups];  // last, because it may have no memory
};
constexpr int kRingBytes =
    sizeof(Ring) - (kHasDresidualOut ? 0 : sizeof(Ring::dresidual_out));
// The sums of half the groups, on their way to the other half.
struct Gathered {
  float sums[kGroups > 1 ? kGroups / 2 : 1][2][kVectors * kVector][kThreads];
};
constexpr int kGatheredBytes = kGroups > 1 ? sizeof(Gathered) : 0;
constexpr int kSumsBytes = (sizeof(WarpSums) + 15) / 16 * 16;
constexpr int kSharedBytes =
    kSumsBytes + (kRingBytes > kGatheredBytes ? kRingBytes : kGatheredBytes);

// `parts` are the sums over the rows of each block or cluster, (workers, sums,
// features). The sums are dscale and dbias, or only the sum that is wanted.
NORM_KERNEL norm_backward(const X* x, const Scale* scale, const float* mean,
                          const float* mean_low, const float* rstd, const Dy* dy,
                          const X* dresidual_out, const float* dmean, const float* drstd,
                          X* dx, float* parts, long long rows) {
  WarpSums& warp_sums = *reinterpret_cast<WarpSums*>(block_memory);
  Ring& ring = *reinterpret_cast<Ring*>(block_memory + kSumsBytes);
  const Place place;
  const int t = place.t, group = place.group, rank = place.rank;
  Values gamma, dscale, dbias;
  FOR_ELEMENTS(v, i) dscale[v][i] = dbias[v][i] = 0.0f;
  if constexpr (!kExact) {
    UNROLL for (int s = 0; s < kStages; ++s) {
      ring.x[s][group].zero(t);
      ring.dy[s][group].zero(t);
      if constexpr (kHasDresidualOut) ring.dresidual_out[s][group].zero(t);
    }
  }
  const auto fetch = [&](long long row, int stage) {
    if (row < rows) {
      ring.x[stage][group].fetch(place.part_of(x, row), t);
      ring.dy[stage][group].fetch(place.part_of(dy, row), t);
      if constexpr (kHasDresidualOut) {
        ring.dresidual_out[stage][group].fetch(place.part_of(dresidual_out, row), t);
      }
    }
    async_commit();  // even of nothing, because groups are counted
  };
  long long row = place.first + group;
  UNROLL for (int s = 0; s < kStages - 1; ++s) fetch(row + s * place.step, s);

  // A row's statistics are on their way while the thread works on the row before.
  float next_high = 0.0f, next_low = 0.0f, next_r = 0.0f;
  const auto fetch_statistics = [&](long long of) {
    if (of >= rows) return;
    if constexpr (kCenter) {
      next_high = mean[of];
      next_low = mean_low[of];
    }
    next_r = rstd[of];
  };
  fetch_statistics(row);
  begin_cluster(warp_sums);
  if constexpr (kHasScale) {
    load_parameter(place.part_of(scale, 0), t, JLN_SCALE_OFFSET, gamma);
  }

  // If rows share a warp, threads without a row still take part in its shuffles.
  int stage = 0, turn = 0;
  for (; kWarps ? row < rows : row - group < rows; row += place.step) {
    const bool here = kWarps || row < rows;
    const float high = next_high, low = next_low, r = next_r;
    fetch_statistics(row + place.step);
    async_wait<kStages - 2>();
    if constexpr (kFetchFirst) fetch(row + (kStages - 1) * place.step, before(stage));
    float along_x_hat = 0.0f, mean_of_g = 0.0f, shift = 0.0f;
    if constexpr (kWithDx) {
      Two sums = {0.0f, 0.0f};
      Elements<X> arrived;
      Elements<Dy> cotangent;
      ring.x[stage][group].read(arrived, t);
      ring.dy[stage][group].read(cotangent, t);
      FOR_ELEMENTS(v, i) {
        float g = cotangent.get(v, i);
        if constexpr (kHasScale) g *= gamma[v][i];
        if constexpr (kCenter) sums.a += g;
        sums.b = multiply_add(g, arrived.get(v, i) - high, sums.b);
      }
      sums = sum_row(sums, warp_sums, turn, group, t, rank);
      turn = kCluster > 1 ? turn + 1 & 3 : turn ^ 1;
      if constexpr (kCenter) {
        sums.b = multiply_add(-low, sums.a, sums.b);
        mean_of_g = sums.a * kInvN;
      }
      // rstd is 0 if squares have overflowed; then these sums may have, too.
      along_x_hat = r == 0.0f ? 0.0f : r * sums.b;
      if (kHasDrstd && here) along_x_hat = multiply_add(r, drstd[row], along_x_hat);
      along_x_hat *= kInvN;
      if (kHasDmean && here) shift = dmean[row] * kInvN;
    }
    if (here) {
      // These are read again instead of kept, because registers are scarcest.
      Elements<X> arrived, more, out;
      Elements<Dy> cotangent;
      ring.x[stage][group].read(arrived, t);
      ring.dy[stage][group].read(cotangent, t);
      if constexpr (kHasDresidualOut) ring.dresidual_out[stage][group].read(more, t);
      FOR_ELEMENTS(v, i) {
        const float x_hat = (arrived.get(v, i) - high - low) * r;
        const float d = cotangent.get(v, i);
        if constexpr (kWithDscale) {
          const float factor = kRound ? rounded<X>(x_hat) : x_hat;
          dscale[v][i] = multiply_add(d, factor, dscale[v][i]);
        }
        if constexpr (kWithDbias) dbias[v][i] += d;
        if constexpr (kWithDx) {
          const float g = kHasScale ? d * gamma[v][i] : d;
          float value = multiply_add(-x_hat, along_x_hat, g) - mean_of_g;
          value = multiply_add(value, r, shift);
          if constexpr (kHasDresidualOut) value += more.get(v, i);
          out.set(v, i, value);
        }
      }
      if constexpr (kWithDx) out.store_to(place.part_of(dx, row), t);
    }
    if constexpr (!kFetchFirst) fetch(row + (kStages - 1) * place.step, before(stage));
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  async_wait<0>();

  if constexpr (kWithDscale || kWithDbias) {
    // Adds the groups' sums in a tree: the sums of the upper half go to the lower half.
    Gathered& gathered = *reinterpret_cast<Gathered*>(block_memory + kSumsBytes);
    UNROLL for (int n = kGroups; n > 1; n = (n + 1) / 2) {
      const int half = (n + 1) / 2;
      barrier(0, kBlock);
      if (group >= half && group < n) {
        FOR_ELEMENTS(v, i) {
          gathered.sums[group - half][0][v * kVector + i][t] = dscale[v][i];
          gathered.sums[group - half][1][v * kVector + i][t] = dbias[v][i];
        }
      }
      barrier(0, kBlock);
      if (group < n - half) {
        FOR_ELEMENTS(v, i) {
          dscale[v][i] += gathered.sums[group][0][v * kVector + i][t];
          dbias[v][i] += gathered.sums[group][1][v * kVector + i][t];
        }
      }
    }
    if (group == 0) {
      constexpr int sums = kWithDscale + kWithDbias;
      float* to = parts + place.worker * sums * kFeatures + rank * kPart;
      FOR_ELEMENTS(v, i) {
        if (!inside(v, t)) continue;
        float* at = to + column_of(v, t) + i;
        if constexpr (kWithDscale) at[0] = dscale[v][i];
        if constexpr (kWithDbias) at[(sums - 1) * kFeatures] = dbias[v][i];
      }
    }
  }
}
#endif

#ifdef JLN_SUM_PARTS
// The sums of norm_backward's parts, (count, sums, features), in a fixed order. A block
// takes 32 columns, and each of its 8 warps takes every eighth part.
KERNEL(256) norm_sum_parts(const float* parts, float* dscale, float* dbias,
                           long long count) {
  constexpr int columns = (JLN_WITH_DSCALE + JLN_WITH_DBIAS) * JLN_FEATURES;
  auto& sums = *reinterpret_cast<float(*)[8][32]>(block_memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (column < columns) {
    _Pragma("unroll 4") for (long long part = warp; part < count; part += 8) {
      sum += parts[part * columns + column];
    }
  }
  sums[warp][lane] = sum;
  barrier(0, 256);
  if (warp > 0 || column >= columns) return;
  for (int w = 1; w < 8; ++w) sum += sums[w][lane];
  if (JLN_WITH_DSCALE && column < JLN_FEATURES) {
    dscale[column] = sum;
  } else {
    dbias[column - JLN_WITH_DSCALE * JLN_FEATURES] = sum;
  }
}
#endif
