#include "norm.h"

#include <algorithm>
#include <cstring>
#include <memory>

namespace jax_layernorm {
namespace {

// With fewer elements per thread than this, waking another thread costs more time than it
// saves.
constexpr int64_t kElementsForAThread = 32 * 1024;
constexpr int64_t kChunkElements = 16 * 1024;
// With a residual, this many elements are added and then normalized, so that their sum is
// still in the first-level cache when the norm reads it.
constexpr int64_t kAddedElements = 4096;
// dscale and dbias are summed over blocks of rows, and then over the blocks. A block is
// large enough that its sums are small beside its part of x. There are few enough blocks
// that adding up their sums is cheap, and enough of them for many threads.
constexpr int64_t kLeastBlockRows = 32;
constexpr int64_t kLeastBlockElements = 8 * 1024;
constexpr int64_t kMostBlocks = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
T* advance(T* data, Dtype dtype, int64_t elements) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  if (data == nullptr) return nullptr;
  return static_cast<Byte*>(data) + elements * kBytesOf[dtype];
}

int64_t helpers_for(int64_t elements) { return elements / kElementsForAThread - 1; }

// A parameter plus `offset` (scale_offset for scale, 0 for bias), in the dtype of the
// arithmetic. `Problem` is a problem of the forward or the backward pass.
class Parameter {
 public:
  template <class Problem>
  Parameter(const In& in, double offset, const Problem& p, Dtype compute,
            const RowKernels& kernels, int slot)
      : in_(in), offset_(offset), round_(p.round_before_scale),
        rows_each_(p.rows / in.groups), features_(p.features), compute_(compute),
        widen_(kernels.widen[compute == kFloat64][in.dtype]), slot_(slot),
        as_given_(in.dtype == compute && offset == 0) {
    if (in.groups == 1) shared_ = of_row(0, once_);
  }

  const void* of_row(int64_t row, Scratch& scratch) const {
    if (shared_ != nullptr || in_.data == nullptr) return shared_;
    const void* from = advance(in_.data, in_.dtype, row / rows_each_ * features_);
    if (as_given_) return from;
    void* to = scratch.bytes(slot_, features_ * kBytesOf[compute_]);
    widen_(from, offset_, round_, to, features_);
    return to;
  }

  // The end of the group of rows that `row` is in.
  int64_t until(int64_t row) const { return (row / rows_each_ + 1) * rows_each_; }

 private:
  const In& in_;
  const double offset_;
  const bool round_;
  const int64_t rows_each_, features_;
  const Dtype compute_;
  void (*const widen_)(const void*, double, bool, void*, int64_t);
  const int slot_;
  const bool as_given_;
  Scratch once_;
  const void* shared_ = nullptr;
};

// The gradient of a parameter, which is a sum over the rows of each group. Any thread may
// sum a block of rows. If a group has several blocks, their sums are then added in order.
struct Gradient {
  Out out;
  int64_t rows_each = 0;    // rows in a group
  int64_t blocks_each = 0;  // blocks in a group; 0 if a block holds one or more groups
  std::unique_ptr<double[]> partial = nullptr;  // the sums of the blocks, if any
};

// The rows in `count` blocks: each unit of `unit` rows is split into `in_a_unit` blocks of
// `rows` rows, of which the last may be shorter.
struct RowBlocks {
  int64_t rows, unit, in_a_unit, count;
};

RowBlocks row_blocks(const BackwardProblem& p, const Gradient& a, const Gradient& b) {
  int64_t rows = std::max({kLeastBlockRows, ceil_div(p.rows, kMostBlocks),
                           ceil_div(kLeastBlockElements, p.features)});
  int64_t unit = p.rows;
  // A block has a multiple of this many rows, because the row kernels take 4 rows together
  // and because a group that is smaller than a block must lie in one block.
  int64_t inside = 4;
  for (const Gradient* gradient : {&a, &b}) {
    if (gradient->out.data == nullptr) continue;
    if (gradient->rows_each < rows) {
      inside = std::max(inside % gradient->rows_each ? 1 : inside, gradient->rows_each);
    } else {
      unit = std::min(unit, gradient->rows_each);
    }
  }
  rows = std::min(ceil_div(rows, inside) * inside, unit);
  const int64_t in_a_unit = ceil_div(unit, rows);
  return {rows, unit, in_a_unit, p.rows / unit * in_a_unit};
}

bool sum_blocks(const Gradient& g, int64_t features, int64_t padded, Dtype compute,
                const RowKernels& kernels, Pool& pool) {
  if (g.partial == nullptr) return true;
  const bool wide = compute == kFloat64;
  const int64_t columns = 1024, strips = ceil_div(features, columns);
  return parallel_for(
      pool, g.out.groups * strips, helpers_for(g.out.groups * g.blocks_each * features),
      [&](int64_t chunk, Scratch&) {
        const int64_t group = chunk / strips, first = chunk % strips * columns;
        const int64_t sums = group * g.blocks_each * kSumWords[wide] * padded;
        kernels.sum[wide](g.partial.get() + sums + first, g.blocks_each, padded,
                          advance(g.out.data, compute, group * features + first),
                          std::min(columns, features - first));
      });
}

}  // namespace

const RowKernels& best_kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("fma")) {
    return kAvx512Kernels;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return kAvx2Kernels;
  }
#endif
  return kBaselineKernels;
}

bool run(const ForwardProblem& p, const RowKernels& kernels, Pool& pool) try {
  const bool adds = p.residual.data != nullptr;
  const Dtype normalized = adds ? p.residual_out.dtype : p.x.dtype;
  const Dtype compute = computed(normalized);
  const Parameter gamma(p.scale, p.scale_offset, p, compute, kernels, 0);
  const Parameter bias(p.bias, 0, p, compute, kernels, 1);
  const auto forward = kernels.forward[p.center][normalized][p.y.dtype];
  const auto add = kernels.add[p.x.dtype][p.residual.dtype];
  const int64_t most = adds ? std::max<int64_t>(1, kAddedElements / p.features) : p.rows;
  const int64_t chunk_rows = std::max<int64_t>(1, kChunkElements / p.features);

  const auto body = [&](int64_t chunk, Scratch& scratch) {
    const int64_t end = std::min(p.rows, (chunk + 1) * chunk_rows);
    for (int64_t row = chunk * chunk_rows; row < end;) {
      const int64_t stop = std::min({end, row + most, gamma.until(row), bias.until(row)});
      const int64_t element = row * p.features, rows = stop - row;
      ForwardRows a{};
      a.rows = rows;
      a.features = p.features;
      a.epsilon = p.epsilon;
      a.x = advance(p.x.data, p.x.dtype, element);
      if (adds) {
        void* sum = advance(p.residual_out.data, p.residual_out.dtype, element);
        add(a.x, advance(p.residual.data, p.residual.dtype, element), sum,
            rows * p.features);
        a.x = sum;
      }
      a.gamma = gamma.of_row(row, scratch);
      a.bias = bias.of_row(row, scratch);
      a.y = advance(p.y.data, p.y.dtype, element);
      a.mean = advance(p.mean.data, compute, row);
      a.mean_low = advance(p.mean_low.data, compute, row);
      a.rstd = advance(p.rstd.data, compute, row);
      a.round_x_hat = p.round_before_scale;
      a.round_product = p.round_product;
      a.round_sum = p.round_sum;
      forward(a);
      row = stop;
    }
  };
  return parallel_for(pool, ceil_div(p.rows, chunk_rows),
                      helpers_for(p.rows * p.features), body);
} catch (const std::bad_alloc&) {
  return false;
}

bool run(const BackwardProblem& p, const RowKernels& kernels, Pool& pool) try {
  const Dtype compute = computed(p.x.dtype);
  const Parameter gamma(p.scale, p.scale_offset, p, compute, kernels, 0);
  const auto backward = kernels.backward[p.center][p.x.dtype][p.dy.dtype];

  const bool wide = compute == kFloat64;
  const int64_t padded = ceil_div(p.features, kPadding) * kPadding;
  const int64_t sum_size = kSumWords[wide] * padded;

  Gradient dscale{p.dscale, p.rows / p.dscale.groups};
  Gradient dbias{p.dbias, p.rows / p.dbias.groups};
  const RowBlocks blocks = row_blocks(p, dscale, dbias);
  for (Gradient* g : {&dscale, &dbias}) {
    if (g->out.data == nullptr || g->rows_each <= blocks.rows) continue;
    g->blocks_each = blocks.count / g->out.groups;
    g->partial.reset(new double[blocks.count * sum_size]);
  }

  const auto body = [&](int64_t block, Scratch& scratch) {
    const int64_t unit = block / blocks.in_a_unit * blocks.unit;
    const int64_t begin = unit + block % blocks.in_a_unit * blocks.rows;
    const int64_t end = std::min(begin + blocks.rows, unit + blocks.unit);
    const Gradient* const gradients[] = {&dscale, &dbias};
    double* sums[2] = {};
    for (int64_t row = begin; row < end;) {
      int64_t stop = std::min(end, gamma.until(row));
      for (int i = 0; i < 2; ++i) {
        const Gradient& g = *gradients[i];
        if (g.out.data == nullptr) continue;
        if (row == begin || row % g.rows_each == 0) {
          const int64_t size = sum_size * int64_t{sizeof(double)};
          sums[i] = g.partial != nullptr
                        ? g.partial.get() + block * sum_size
                        : static_cast<double*>(scratch.bytes(2 + i, size));
          std::memset(sums[i], 0, size);
        }
        stop = std::min(stop, (row / g.rows_each + 1) * g.rows_each);
      }
      const int64_t element = row * p.features;
      BackwardRows a{};
      a.rows = stop - row;
      a.features = p.features;
      a.x = advance(p.x.data, p.x.dtype, element);
      a.dy = advance(p.dy.data, p.dy.dtype, element);
      a.dresidual_out = advance(p.dresidual_out.data, p.x.dtype, element);
      a.gamma = gamma.of_row(row, scratch);
      a.mean = advance(p.mean.data, compute, row);
      a.mean_low = advance(p.mean_low.data, compute, row);
      a.rstd = advance(p.rstd.data, compute, row);
      a.dmean = advance(p.dmean.data, compute, row);
      a.drstd = advance(p.drstd.data, compute, row);
      a.dx = advance(p.dx.data, p.dx.dtype, element);
      a.dscale = sums[0];
      a.dbias = sums[1];
      a.padded = padded;
      a.round_x_hat = p.round_before_scale;
      backward(a);
      for (int i = 0; i < 2; ++i) {  // write the sums of each group that ends here
        const Gradient& g = *gradients[i];
        if (sums[i] == nullptr || g.partial != nullptr || stop % g.rows_each != 0) continue;
        void* to = advance(g.out.data, compute, row / g.rows_each * p.features);
        kernels.sum[wide](sums[i], 1, padded, to, p.features);
      }
      row = stop;
    }
  };
  return parallel_for(pool, blocks.count, helpers_for(p.rows * p.features), body) &&
         sum_blocks(dscale, p.features, padded, compute, kernels, pool) &&
         sum_blocks(dbias, p.features, padded, compute, kernels, pool);
} catch (const std::bad_alloc&) {
  return false;
}

}  // namespace jax_layernorm
