// Tests of the CPU kernel without Python and XLA, so that sanitizers can check it:
//
//   driver CASES SEED
//
// compares CASES random problems with long double, each on a random instruction set of
// those that this processor has, and runs the tests of threads and of a huge array.
//
// A problem has random dtypes, shapes, alignments, groups of parameters and optional
// arrays. The reference is the textbook formula on scalars, in two passes in long double.

#include <sys/mman.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "norm.h"

using namespace jax_layernorm;
using Real = long double;

namespace {

int failures = 0;
std::string current;

void check(bool right, const char* what) {
  if (right) return;
  std::printf("FAILED %s: %s\n", current.c_str(), what);
  if (++failures > 20) std::exit(1);
}

// ---- the dtypes, one element at a time ------------------------------------------------

// A normal number is 2**e * 1.f, with e from least_exponent to most_exponent, and `digits`
// counts the bits of 1.f.
struct Format { int digits, least_exponent, most_exponent; };
const Format kFormats[kDtypes] = {{24, -126, 127}, {8, -126, 127}, {11, -14, 15},
                                  {53, -1022, 1023}};

Real eps(Dtype dtype) { return std::ldexp(Real{1}, 1 - kFormats[dtype].digits); }

// Rounds to the nearest value of the dtype, ties to even.
Real rounded(Real v, Dtype dtype) {
  if (!std::isfinite(v) || v == 0) return v;
  const Format f = kFormats[dtype];
  const int exponent = std::max(std::ilogb(v), f.least_exponent);
  const Real unit = std::ldexp(Real{1}, exponent - f.digits + 1);
  const Real result = std::nearbyint(v / unit) * unit;
  const Real most = std::ldexp(Real{2} - eps(dtype), f.most_exponent);
  return std::fabs(result) > most ? std::copysign(HUGE_VALL, v) : result;
}

Real get(const void* data, Dtype dtype, int64_t i) {
  if (dtype == kFloat32) {
    float v;
    std::memcpy(&v, static_cast<const char*>(data) + 4 * i, 4);
    return v;
  }
  if (dtype == kFloat64) {
    double v;
    std::memcpy(&v, static_cast<const char*>(data) + 8 * i, 8);
    return v;
  }
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(data) + 2 * i, 2);
  const Format f = kFormats[dtype];
  const int stored = f.digits - 1;
  const int biased = (bits & 0x7fff) >> stored;
  const int fraction = bits & ((1 << stored) - 1);
  Real v;
  if (biased == f.most_exponent * 2 + 1) {
    v = fraction ? NAN : HUGE_VALL;
  } else if (biased == 0) {
    v = std::ldexp(Real(fraction), f.least_exponent - stored);
  } else {
    v = std::ldexp(Real(fraction + (1 << stored)), biased - f.most_exponent - stored);
  }
  return bits & 0x8000 ? -v : v;
}

void set(void* data, Dtype dtype, int64_t i, Real v) {
  v = rounded(v, dtype);
  char* to = static_cast<char*>(data) + kBytesOf[dtype] * i;
  if (dtype == kFloat32) {
    const float w = static_cast<float>(v);
    std::memcpy(to, &w, 4);
  } else if (dtype == kFloat64) {
    const double w = static_cast<double>(v);
    std::memcpy(to, &w, 8);
  } else {
    const Format f = kFormats[dtype];
    const int stored = f.digits - 1;
    uint16_t bits = 0;
    const Real a = std::fabs(v);
    if (a != 0) {
      const int exponent = std::max(std::ilogb(a), f.least_exponent);
      const int fraction = static_cast<int>(std::ldexp(a, stored - exponent));
      const int biased = fraction >> stored ? exponent + f.most_exponent : 0;
      bits = static_cast<uint16_t>(biased << stored | (fraction & ((1 << stored) - 1)));
    }
    if (std::signbit(v)) bits |= 0x8000;
    std::memcpy(to, &bits, 2);
  }
}

// ---- arrays, pools --------------------------------------------------------------------

// An array whose address is only aligned to the size of its elements. The memory ends with
// the array, and begins with a guard that must not change.
struct Array {
  Array(int64_t n, Dtype dtype, int offset)
      : n(n), dtype(dtype), guard(64 + offset * kBytesOf[dtype]),
        memory(guard + n * kBytesOf[dtype], 0x5a) {}
  void* data() { return memory.data() + guard; }
  const void* data() const { return memory.data() + guard; }
  Real operator[](int64_t i) const { return get(data(), dtype, i); }
  bool guarded() const {
    return std::all_of(memory.begin(), memory.begin() + guard,
                       [](unsigned char c) { return c == 0x5a; });
  }
  int64_t n;
  Dtype dtype;
  int64_t guard;
  std::vector<unsigned char> memory;
};

class Workers : public Pool {
 public:
  explicit Workers(int n) : n_(n) {
    for (int i = 0; i < n; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Workers() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    changed_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int64_t threads() const override { return n_; }
  void schedule(std::function<void()> task) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    changed_.notify_one();
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      auto task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      task();
      lock.lock();
    }
  }

  int n_;
  bool closing_ = false;
  std::deque<std::function<void()>> tasks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> threads_;
};

std::vector<const RowKernels*> all_kernels() {
  std::vector<const RowKernels*> found = {&kBaselineKernels};
#if defined(__x86_64__)
  const RowKernels* best = &best_kernels();
  if (best != &kBaselineKernels) found.push_back(&kAvx2Kernels);
  if (best == &kAvx512Kernels) found.push_back(&kAvx512Kernels);
#endif
  return found;
}

// ---- random problems ------------------------------------------------------------------

class Case {
 public:
  Case(std::mt19937_64& random, int64_t rows, int64_t features)
      : random_(random), rows_(rows), features_(features), n_(rows * features) {
    center_ = coin();
    x_ = dtype();
    residual_ = coin(3) ? dtype() : kDtypes;
    normalized_ = residual_ == kDtypes ? x_ : promoted(x_, residual_);
    y_ = coin(3) ? dtype() : x_;
    compute_ = computed(normalized_);
    round_before_scale_ = coin(4);
    scale_offset_ = coin(3) ? 1 : 0;
    epsilon_ = coin() ? 1e-6 : 1e-2;
    scale_groups_ = coin(4) ? 0 : groups();
    bias_groups_ = coin(4) ? 0 : coin() ? 1 : scale_groups_ ? scale_groups_ : groups();
    dscale_groups_ = scale_groups_ == 0 ? 0 : coin(4) ? rows_ : scale_groups_;
    scale_dtype_ = dtype();
    bias_dtype_ = dtype();
    dresidual_out_ = residual_ != kDtypes && coin();
    dmean_ = center_ && coin(3);
    drstd_ = coin(3);
  }

  void run_and_compare(const RowKernels& kernels, Pool& pool) {
    // The mean is up to 2**11 standard deviations, and float16 can hold all spreads.
    const Real spread = std::ldexp(Real{1}, between(-3, 3));
    const Real offset = coin() ? 0 : std::ldexp(spread, between(0, 11));
    Array x = normal(n_, x_, spread, offset);
    Array residual = normal(n_, residual_ == kDtypes ? x_ : residual_, spread, 0);
    Array scale = normal(std::max<int64_t>(scale_groups_, 1) * features_, scale_dtype_, .5, 1);
    Array bias = normal(std::max<int64_t>(bias_groups_, 1) * features_, bias_dtype_, .5, 0);
    Array y = empty(n_, y_), residual_out = empty(n_, normalized_);
    Array mean = empty(rows_, compute_), low = empty(rows_, compute_);
    Array rstd = empty(rows_, compute_);

    ForwardProblem f{};
    f.center = center_;
    f.round_before_scale = round_before_scale_;
    f.round_product = coin();  // whatever the dtypes; Python decides
    f.round_sum = coin();
    f.rows = rows_;
    f.features = features_;
    f.epsilon = epsilon_;
    f.scale_offset = scale_offset_;
    f.x = {x.data(), x_, 1};
    if (residual_ != kDtypes) {
      f.residual = {residual.data(), residual_, 1};
      f.residual_out = {residual_out.data(), normalized_, 1};
    }
    if (scale_groups_) f.scale = {scale.data(), scale_dtype_, scale_groups_};
    if (bias_groups_) f.bias = {bias.data(), bias_dtype_, bias_groups_};
    f.y = {y.data(), y_, 1};
    if (center_) {
      f.mean = {mean.data(), compute_, 1};
      f.mean_low = {low.data(), compute_, 1};
    }
    f.rstd = {rstd.data(), compute_, 1};
    check(run(f, kernels, pool), "forward ran out of memory");

    Array dy = normal(n_, y_, 1, 0), dresidual_out = normal(n_, normalized_, 1, 0);
    Array dmean = normal(rows_, compute_, 1, 0), drstd = normal(rows_, compute_, 1, 0);
    Array dx = empty(n_, normalized_);
    Array dscale = empty(std::max<int64_t>(dscale_groups_, 1) * features_, compute_);
    Array dbias = empty(std::max<int64_t>(bias_groups_, 1) * features_, compute_);
    const Array& sum = residual_ == kDtypes ? x : residual_out;

    BackwardProblem b{};
    b.center = center_;
    b.round_before_scale = round_before_scale_;
    b.rows = rows_;
    b.features = features_;
    b.scale_offset = scale_offset_;
    b.x = {sum.data(), normalized_, 1};
    b.scale = f.scale;
    if (center_) {
      b.mean = {mean.data(), compute_, 1};
      b.mean_low = {low.data(), compute_, 1};
    }
    b.rstd = {rstd.data(), compute_, 1};
    b.dy = {dy.data(), y_, 1};
    if (dresidual_out_) b.dresidual_out = {dresidual_out.data(), normalized_, 1};
    if (dmean_) b.dmean = {dmean.data(), compute_, 1};
    if (drstd_) b.drstd = {drstd.data(), compute_, 1};
    b.dx = {dx.data(), normalized_, 1};
    if (dscale_groups_) b.dscale = {dscale.data(), compute_, dscale_groups_};
    if (bias_groups_) b.dbias = {dbias.data(), compute_, bias_groups_};
    check(run(b, kernels, pool), "backward ran out of memory");

    if (residual_ != kDtypes) {
      for (int64_t i = 0; i < n_; ++i) {
        // One rounding in the arithmetic, and one in storage.
        Real right = residual[i] + x[i];
        if (compute_ == kFloat64) {  // a long double sum would round twice
          right = static_cast<double>(residual[i]) + static_cast<double>(x[i]);
        }
        right = rounded(rounded(right, compute_), normalized_);
        check(residual_out[i] == right, "residual_out");
      }
    }
    compare(sum, scale, bias, y, mean, low, rstd, dy, dresidual_out, dmean, drstd, dx,
            dscale, dbias);
    if (scale_groups_ <= 1 && bias_groups_ <= 1 && dscale_groups_ <= 1) {
      rows_alone(f, b, kernels, pool);
    }
    parameters_alone(b, kernels, pool);
    for (const Array* a :
         {&x, &residual, &scale, &bias, &y, &residual_out, &mean, &low, &rstd, &dy,
          &dresidual_out, &dmean, &drstd, &dx, &dscale, &dbias}) {
      check(a->guarded(), "wrote before an array");
    }
  }

 private:
  // Some consecutive rows, as a problem without the other rows: the same bits.
  void rows_alone(ForwardProblem f, BackwardProblem b, const RowKernels& kernels,
                  Pool& pool) {
    const int64_t first = random_() % rows_, rows = 1 + random_() % (rows_ - first);
    std::deque<Array> results;
    std::vector<std::pair<const char*, const Array*>> whole;
    const auto from = [&](In& in, int64_t each) {
      if (in.data == nullptr) return;
      in.data = static_cast<const char*>(in.data) + first * each * kBytesOf[in.dtype];
    };
    const auto replace = [&](Out& out, int64_t each) {
      if (out.data == nullptr) return;
      results.push_back(empty(rows * each, out.dtype));
      const char* data = static_cast<const char*>(out.data);
      whole.emplace_back(data + first * each * kBytesOf[out.dtype], &results.back());
      out.data = results.back().data();
    };
    f.rows = b.rows = rows;
    for (In* in : {&f.x, &f.residual, &b.x, &b.dy, &b.dresidual_out}) from(*in, features_);
    for (In* in : {&b.mean, &b.mean_low, &b.rstd, &b.dmean, &b.drstd}) from(*in, 1);
    for (Out* out : {&f.y, &f.residual_out, &b.dx}) replace(*out, features_);
    for (Out* out : {&f.mean, &f.mean_low, &f.rstd}) replace(*out, 1);
    b.dscale = b.dbias = Out{};
    check(run(f, kernels, pool) && run(b, kernels, pool), "rows alone: memory");
    for (const auto& [data, alone] : whole) {
      const auto bytes = static_cast<size_t>(alone->n * kBytesOf[alone->dtype]);
      check(std::memcmp(data, alone->data(), bytes) == 0, "rows alone: other bits");
    }
  }

  // The gradients of the parameters alone: the same bits.
  void parameters_alone(BackwardProblem b, const RowKernels& kernels, Pool& pool) {
    std::deque<Array> results;
    b.dx = Out{};
    std::vector<std::pair<const void*, const Array*>> both;
    for (Out* out : {&b.dscale, &b.dbias}) {
      if (out->data == nullptr) continue;
      results.push_back(empty(out->groups * features_, out->dtype));
      both.emplace_back(out->data, &results.back());
      out->data = results.back().data();
    }
    check(run(b, kernels, pool), "parameters alone: memory");
    for (const auto& [data, alone] : both) {
      const auto bytes = static_cast<size_t>(alone->n * kBytesOf[alone->dtype]);
      check(std::memcmp(data, alone->data(), bytes) == 0, "parameters alone: other bits");
    }
  }

  void compare(const Array& x, const Array& scale, const Array& bias, const Array& y,
               const Array& mean, const Array& low, const Array& rstd, const Array& dy,
               const Array& dresidual_out, const Array& dmean, const Array& drstd,
               const Array& dx, const Array& dscale, const Array& dbias) {
    const Real e = eps(compute_), N = features_;
    std::vector<Real> ds(dscale.n), ds_size(dscale.n), ds_rounding(dscale.n);
    std::vector<Real> db(dbias.n), db_size(dbias.n);
    std::vector<Real> x_hat(features_), g(features_), gamma(features_);
    for (int64_t r = 0; r < rows_; ++r) {
      const auto at = [&](int64_t i) { return r * features_ + i; };
      Real m = 0, square = 0, most_x = 0, most_x_hat = 0, most_g = 0;
      for (int64_t i = 0; i < features_; ++i) {
        m += x[at(i)] / N;
        most_x = std::max(most_x, std::fabs(x[at(i)]));
      }
      // At a large mean, one pass in long double is not accurate enough for float64.
      Real correction = 0;
      for (int64_t i = 0; i < features_; ++i) correction += (x[at(i)] - m) / N;
      m = center_ ? m + correction : 0;
      for (int64_t i = 0; i < features_; ++i) {
        square += (x[at(i)] - m) * (x[at(i)] - m);
      }
      const Real s = 1 / std::sqrt(square / N + epsilon_);
      Real mean_g = 0, along = 0;
      for (int64_t i = 0; i < features_; ++i) {
        gamma[i] = 1;
        if (scale_groups_) {
          gamma[i] = scale_offset_ + scale[r / (rows_ / scale_groups_) * features_ + i];
          if (round_before_scale_) gamma[i] = rounded(gamma[i], scale_dtype_);
        }
        x_hat[i] = (x[at(i)] - m) * s;
        g[i] = dy[at(i)] * gamma[i];
        mean_g += g[i] / N;
        along += g[i] * x_hat[i] / N;
        most_x_hat = std::max(most_x_hat, std::fabs(x_hat[i]));
        most_g = std::max(most_g, std::fabs(g[i]));
      }
      const Real lost = center_ ? s * e * most_x : 0;
      const Real x_hat_size = most_x_hat + lost;
      const Real from_rstd = drstd_ ? s * drstd[r] / N : 0;
      const Real from_mean = dmean_ ? dmean[r] / N : 0;
      Real terms = most_g + x_hat_size * (std::fabs(along) + std::fabs(from_rstd));
      if (center_) terms += std::fabs(mean_g) + std::fabs(from_mean) / s;
      for (int64_t i = 0; i < features_; ++i) {
        Real gamma_size = std::fabs(gamma[i]);
        const bool narrowed = scale_dtype_ == kFloat64 && compute_ != kFloat64;
        if (scale_groups_ && scale_offset_ != 0 && narrowed) {
          gamma_size += 1;  // the scale is rounded before the offset is added
        }
        Real right = x_hat[i] * gamma[i], size = x_hat_size * gamma_size;
        if (bias_groups_) {
          const Real shift = bias[r / (rows_ / bias_groups_) * features_ + i];
          right += shift;
          size += std::fabs(shift);
        }
        // Of x_hat, the product and the sum.
        near(y[at(i)], right, size, y_, 1, "y", 3 * rounding(size));
        Real v = g[i] - x_hat[i] * (along + from_rstd);
        if (center_) v -= mean_g;
        v = v * s + from_mean;
        size = s * terms * (1 + lost);
        if (dresidual_out_) {
          v += dresidual_out[at(i)];
          size += std::fabs(dresidual_out[at(i)]);
        }
        near(dx[at(i)], v, size, normalized_, N, "dx");
        if (dscale_groups_) {
          const int64_t k = r / (rows_ / dscale_groups_) * features_ + i;
          ds[k] += dy[at(i)] * x_hat[i];
          ds_size[k] += std::fabs(dy[at(i)]) * x_hat_size;
          ds_rounding[k] += std::fabs(dy[at(i)]) * rounding(x_hat[i]);
        }
        if (bias_groups_) {
          const int64_t k = r / (rows_ / bias_groups_) * features_ + i;
          db[k] += dy[at(i)];
          db_size[k] += std::fabs(dy[at(i)]);
        }
      }
      near(rstd[r], s, s, compute_, 1, "rstd");
      if (center_) {
        near(mean[r] + low[r], m, most_x_hat / s + 8 * e * most_x, compute_, 1, "mean");
        near(mean[r], m, most_x, compute_, 1, "the mean's high word");
      }
    }
    if (dscale_groups_) {
      for (int64_t i = 0; i < dscale.n; ++i) {
        near(dscale[i], ds[i], ds_size[i], compute_, 1, "dscale", ds_rounding[i]);
      }
    }
    if (bias_groups_) {
      for (int64_t i = 0; i < dbias.n; ++i) {
        near(dbias[i], db[i], db_size[i], compute_, 1, "dbias");
      }
    }
  }

  // Allows what oracle.assert_close allows in the Python tests: one rounding to the dtype
  // of the result and a few roundings of the arithmetic, relative to the size of the terms.
  void near(Real actual, Real right, Real size, Dtype dtype, Real summed, const char* what,
            Real more = 0) {
    const Real unit = eps(dtype) / 2 + eps(compute_) * (4 + 0.5L * std::sqrt(summed));
    const Real denormal = std::ldexp(Real{1}, kFormats[dtype].least_exponent) * eps(dtype);
    if (std::fabs(actual - right) <= size * unit + denormal + more) return;
    if (std::isinf(rounded(right, dtype)) && actual == rounded(right, dtype)) return;
    char text[200];
    std::snprintf(text, sizeof text, "%s is %.9Lg and not %.9Lg (+- %.2Lg)", what, actual,
                  right, size * unit);
    check(false, text);
  }

  // How far `round_before_scale` may move a value of this size, in one rounding.
  Real rounding(Real size) const {
    if (!round_before_scale_ || eps(normalized_) <= eps(kFloat32)) return 0;
    const Real denormal = std::ldexp(Real{1}, kFormats[normalized_].least_exponent);
    return (std::fabs(size) + denormal) * eps(normalized_);
  }
  bool coin(int sides = 2) { return random_() % sides == 0; }
  int between(int a, int b) { return a + static_cast<int>(random_() % (b - a + 1)); }
  Dtype dtype() { return static_cast<Dtype>(random_() % kDtypes); }
  int64_t groups() {
    std::vector<int64_t> divisors;
    for (int64_t d = 1; d <= rows_; ++d) {
      if (rows_ % d == 0) divisors.push_back(d);
    }
    return coin() ? 1 : divisors[random_() % divisors.size()];
  }
  Array empty(int64_t n, Dtype dtype) { return Array(n, dtype, between(0, 15)); }
  Array normal(int64_t n, Dtype dtype, Real size, Real middle) {
    Array array = empty(n, dtype);
    std::normal_distribution<double> draw;
    for (int64_t i = 0; i < n; ++i) {
      set(array.data(), dtype, i, draw(random_) * size + middle);
    }
    return array;
  }

  std::mt19937_64& random_;
  int64_t rows_, features_, n_;
  bool center_, round_before_scale_, dresidual_out_, dmean_, drstd_;
  Dtype x_, residual_, normalized_, y_, compute_, scale_dtype_, bias_dtype_;
  double scale_offset_, epsilon_;
  int64_t scale_groups_, bias_groups_, dscale_groups_;
};

void fuzz(int64_t cases, uint64_t seed) {
  std::vector<std::unique_ptr<Workers>> pools;
  for (int n : {1, 2, 4}) pools.push_back(std::make_unique<Workers>(n));
  const auto kernels = all_kernels();
  for (int64_t i = 0; i < cases; ++i) {
    std::mt19937_64 random(seed + i);
    // Most shapes are small, around the widths of vectors. Some are larger than the blocks
    // of a sum and than the chunks of a thread.
    const int kind = static_cast<int>(random() % 1000);
    int64_t rows = 1 + random() % 12, features = 1 + random() % 70;
    if (kind < 20) rows = 1 + random() % 400;
    if (kind >= 980) features = 1 + random() % 5000;
    if (kind == 500) rows = 1 + random() % 40, features = 4000 + random() % 5000;
    const RowKernels& each = *kernels[random() % kernels.size()];
    current = "case " + std::to_string(seed + i) + " (" + each.name + ", " +
              std::to_string(rows) + "x" + std::to_string(features) + ")";
    Case(random, rows, features).run_and_compare(each, *pools[random() % pools.size()]);
  }
  std::printf("%lld cases on", static_cast<long long>(cases));
  for (const RowKernels* each : kernels) std::printf(" %s", each->name);
  std::printf("\n");
}

// While it exists, this thread takes float32 denormals for 0, as XLA's threads do.
class Flushing {
 public:
  Flushing() { set(kept_ | kBits); }
  ~Flushing() { set(kept_); }

 private:
#if defined(__x86_64__)
  static constexpr unsigned kBits = 0x8040;  // FTZ and DAZ
  static unsigned get() { return _mm_getcsr(); }
  static void set(unsigned to) { _mm_setcsr(to); }
  unsigned kept_ = get();
#elif defined(__aarch64__)
  static constexpr uint64_t kBits = uint64_t{1} << 24;  // FZ
  static uint64_t get() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set(uint64_t to) { asm volatile("msr fpcr, %0" ::"r"(to)); }
  uint64_t kept_ = get();
#endif
};

// Widens every float16 and bfloat16, and rounds sums of two, including infinities and NaN.
// If denormals are flushed, it leaves out bfloat16, whose denormals are those of float32.
void conversions(bool flushed) {
  std::mt19937_64 random(1);
  for (const RowKernels* kernels : all_kernels()) {
    for (Dtype dtype : {kFloat16, kBFloat16}) {
      if (flushed && dtype == kBFloat16) continue;
      current = std::string(flushed ? "flushed " : "") + "conversions on " + kernels->name;
      Array all(65536, dtype, 0), other(65536, dtype, 1), wide(65536, kFloat32, 3);
      Array sums(65536, dtype, 5);
      for (int i = 0; i < 65536; ++i) {
        const uint16_t bits = static_cast<uint16_t>(i);
        const uint16_t random_bits = static_cast<uint16_t>(random());
        std::memcpy(static_cast<char*>(all.data()) + 2 * i, &bits, 2);
        std::memcpy(static_cast<char*>(other.data()) + 2 * i, &random_bits, 2);
      }
      {
        std::unique_ptr<Flushing> flushing(flushed ? new Flushing : nullptr);
        kernels->widen[0][dtype](all.data(), 0, false, wide.data(), 65536);
        kernels->add[dtype][dtype](all.data(), other.data(), sums.data(), 65536);
      }
      for (int i = 0; i < 65536; ++i) {
        const auto same = [](Real a, Real b) {
          return (std::isnan(a) && std::isnan(b)) || a == b;
        };
        check(same(wide[i], all[i]), "widened");
        const Real right = rounded(rounded(all[i] + other[i], kFloat32), dtype);
        check(same(sums[i], right), "rounded");
      }
    }
  }
}

// ---- threads --------------------------------------------------------------------------

// Forward and backward of layer norm. `sums` gets mean, mean_low, rstd, dscale and dbias.
void both_passes(int64_t rows, int64_t features, In x, In dy, In scale, Out y, Out dx,
                 float* sums, Pool& pool, const RowKernels& kernels) {
  ForwardProblem f{};
  f.center = true;
  f.rows = rows;
  f.features = features;
  f.epsilon = 1e-6;
  f.x = x;
  f.scale = scale;
  f.y = y;
  f.mean = {sums, kFloat32, 1};
  f.mean_low = {sums += rows, kFloat32, 1};
  f.rstd = {sums += rows, kFloat32, 1};
  check(run(f, kernels, pool), "memory");
  BackwardProblem b{};
  b.center = true;
  b.rows = rows;
  b.features = features;
  b.x = x;
  b.scale = scale;
  b.mean = {f.mean.data, kFloat32, 1};
  b.mean_low = {f.mean_low.data, kFloat32, 1};
  b.rstd = {f.rstd.data, kFloat32, 1};
  b.dy = dy;
  b.dx = dx;
  b.dscale = {sums += rows, kFloat32, 1};
  b.dbias = {sums += features, kFloat32, 1};
  check(run(b, kernels, pool), "memory");
}

struct Problem {
  explicit Problem(int64_t rows, int64_t features, uint64_t seed)
      : x(rows * features), dy(rows * features), scale(features, 1.5f), rows(rows),
        features(features) {
    std::mt19937_64 random(seed);
    std::normal_distribution<float> draw;
    for (auto& v : x) v = draw(random) + 30;
    for (auto& v : dy) v = draw(random);
  }

  // Returns y, dx, mean, mean_low, rstd, dscale and dbias in one array.
  std::vector<float> run_on(Pool& pool, const RowKernels& kernels) const {
    const int64_t n = rows * features;
    std::vector<float> out(2 * n + 3 * rows + 2 * features);
    both_passes(rows, features, {x.data()}, {dy.data()}, {scale.data()}, {out.data()},
                {out.data() + n}, out.data() + 2 * n, pool, kernels);
    return out;
  }

  std::vector<float> x, dy, scale;
  int64_t rows, features;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), 4 * a.size()) == 0;
}

void number_of_threads() {
  for (const RowKernels* kernels : all_kernels()) {
    for (auto [rows, features] : {std::pair<int64_t, int64_t>{1037, 301}, {3, 70000},
                                  {20000, 9}, {256, 4099}}) {
      current = std::string("number of threads on ") + kernels->name;
      const Problem problem(rows, features, 7);
      Workers one(1);
      const auto expected = problem.run_on(one, *kernels);
      for (int n : {2, 3, 8}) {
        Workers pool(n);
        for (int i = 0; i < 5; ++i) {
          check(same_bits(problem.run_on(pool, *kernels), expected), "other bits");
        }
      }
    }
  }
}

void callers_at_once() {
  current = "callers at once";
  Workers pool(3);
  std::vector<Problem> problems;
  for (int i = 0; i < 4; ++i) problems.emplace_back(400 + 100 * i, 257, i);
  Workers one(1);
  std::vector<std::vector<float>> expected;
  for (const auto& p : problems) expected.push_back(p.run_on(one, best_kernels()));
  std::vector<std::thread> callers;
  for (int t = 0; t < 6; ++t) {
    callers.emplace_back([&, t] {
      for (int i = 0; i < 12; ++i) {
        const int k = (t + i) % 4;
        check(same_bits(problems[k].run_on(pool, best_kernels()), expected[k]), "bits");
      }
    });
  }
  for (auto& caller : callers) caller.join();
}

// A pool that has no memory for a second task.
class FullPool : public Pool {
 public:
  int64_t threads() const override { return 4; }
  void schedule(std::function<void()> task) override {
    if (thread_.joinable()) throw std::bad_alloc();
    thread_ = std::thread(std::move(task));
  }
  ~FullPool() override { thread_.join(); }

 private:
  std::thread thread_;
};

void full_pool() {
  current = "full pool";
  const Problem problem(2000, 300, 3);
  Workers one(1);
  const auto expected = problem.run_on(one, best_kernels());
  FullPool pool;
  check(same_bits(problem.run_on(pool, best_kernels()), expected), "other bits");
}

// All threads of the pool wait until the caller has returned from the norm.
void busy_pool() {
  current = "busy pool";
  const Problem problem(2000, 300, 3);
  Workers one(1);
  const auto expected = problem.run_on(one, best_kernels());
  std::atomic<bool> go{false};
  Workers pool(3);
  for (int i = 0; i < 3; ++i) {
    pool.schedule([&] {
      while (!go) std::this_thread::yield();
    });
  }
  check(same_bits(problem.run_on(pool, best_kernels()), expected), "other bits");
  go = true;  // now the pool runs tasks of a norm that has already returned
}

// ---- more elements than 32 bits count -------------------------------------------------

// A long array in little memory: one piece over and over, and another piece at the end.
class Repeated {
 public:
  Repeated(int64_t piece_bytes, int64_t times) : bytes_(piece_bytes * (times + 1)) {
    const int file = memfd_create("pieces", 0);
    bool right = file >= 0 && ftruncate(file, 2 * piece_bytes) == 0;
    data_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_NONE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    for (int64_t i = 0; right && i <= times; ++i) {
      right = mmap(data_ + i * piece_bytes, piece_bytes, PROT_READ | PROT_WRITE,
                   MAP_SHARED | MAP_FIXED, file, i == times ? piece_bytes : 0) !=
              MAP_FAILED;
    }
    close(file);
    if (!right) {
      std::perror("an array of repeated pieces");
      std::exit(1);
    }
  }
  ~Repeated() { munmap(data_, bytes_); }
  char* data() { return data_; }

 private:
  int64_t bytes_;
  char* data_;
};

// The rows at the end, from element 2**31 on, have the bits that they have alone.
void more_than_32_bits() {
  current = "more than 2**31 elements";
  const int64_t features = 1 << 16, last = 32, times = 1024, rows = last * (times + 1);
  const int64_t piece = last * features, bytes = 2 * piece, start = bytes * times;
  Repeated x(bytes, times), dy(bytes, times), y(bytes, times), dx(bytes, times);
  std::mt19937_64 random(11);
  std::normal_distribution<float> draw;
  for (char* data : {x.data(), dy.data(), x.data() + start, dy.data() + start}) {
    for (int64_t i = 0; i < piece; ++i) set(data, kBFloat16, i, draw(random));
  }
  const std::vector<float> scale(features, 1.5f);
  std::vector<char> y_alone(bytes), dx_alone(bytes);
  std::vector<float> sums(3 * rows + 2 * features), sums_alone(3 * last + 2 * features);
  Workers pool(2);
  both_passes(rows, features, {x.data(), kBFloat16}, {dy.data(), kBFloat16},
              {scale.data()}, {y.data(), kBFloat16}, {dx.data(), kBFloat16}, sums.data(),
              pool, best_kernels());
  both_passes(last, features, {x.data() + start, kBFloat16},
              {dy.data() + start, kBFloat16}, {scale.data()},
              {y_alone.data(), kBFloat16}, {dx_alone.data(), kBFloat16},
              sums_alone.data(), pool, best_kernels());
  check(std::memcmp(y.data() + start, y_alone.data(), bytes) == 0, "y");
  check(std::memcmp(dx.data() + start, dx_alone.data(), bytes) == 0, "dx");
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 1000;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  conversions(false);
  conversions(true);
  number_of_threads();
  callers_at_once();
  busy_pool();
  full_pool();
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // too much memory
  more_than_32_bits();
#endif
  fuzz(cases, seed);
  std::printf(failures == 0 ? "all right\n" : "%d failures\n", failures);
  return failures != 0;
}
