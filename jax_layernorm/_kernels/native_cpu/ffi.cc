// The norm as handlers of XLA's foreign function interface (FFI). This file reads and
// checks what XLA passes; norm.cc computes.
//
// Which arrays there are is told by `has`, a letter for each of those that may be absent,
// and they come in the order of the fields below.

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

#include <functional>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include "norm.h"
#include "xla/ffi/api/ffi.h"

namespace jax_layernorm {
namespace {

namespace ffi = xla::ffi;

class XlaPool : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool) {}
  int64_t threads() const override { return pool_.num_threads(); }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool pool_;
};

// The threads of a forked process's parent are not there.
const pid_t kLoadedBy = getpid();

std::string text_of(ffi::AnyBuffer buffer) {
  std::string text = "dtype " + std::to_string(static_cast<int>(buffer.element_type()));
  text += " (of XLA's PrimitiveType), shape (";
  for (int64_t n : buffer.dimensions()) text += std::to_string(n) + ",";
  return text + ")";
}

// Takes operands and results one after the other, and remembers the first error.
class Reader {
 public:
  Reader(ffi::RemainingArgs args, ffi::RemainingRets rets, std::string_view has,
         int64_t rows, int64_t features)
      : args_(args), rets_(rets), has_(has), rows_(rows), features_(features) {
    if (getpid() != kLoadedBy) {
      fail("was called in a fork of the process that loaded it, where XLA's threads do "
           "not exist. Start processes by the spawn or forkserver method.");
    }
  }

  bool has(char letter) const { return has_.find(letter) != std::string_view::npos; }

  // Each returns nothing where an array is absent, or was wrong.
  In matrix(const char* name) { return take<In>(name, kMatrix); }
  In parameter(const char* name) { return take<In>(name, kParameter); }
  In statistic(const char* name, Dtype dtype) {
    return expected(take<In>(name, kStatistic), name, dtype);
  }
  In matrix(const char* name, Dtype dtype) {
    return expected(take<In>(name, kMatrix), name, dtype);
  }
  Out matrix_out(const char* name) { return take<Out>(name, kMatrix); }
  Out matrix_out(const char* name, Dtype dtype) {
    return expected(take<Out>(name, kMatrix), name, dtype);
  }
  Out parameter_out(const char* name, Dtype dtype) {
    return expected(take<Out>(name, kParameter), name, dtype);
  }
  Out statistic_out(const char* name, Dtype dtype) {
    return expected(take<Out>(name, kStatistic), name, dtype);
  }

  // Once all are taken.
  void finish() {
    if (next_arg_ != args_.size()) fail("got more operands than it was told of.");
    if (next_ret_ != rets_.size()) fail("got more results than it was told of.");
  }

  // Groups of rows must nest: each divides those that are more.
  void nest(int64_t a, int64_t b) {
    if (std::max(a, b) % std::min(a, b) != 0) fail("got groups of rows that cross.");
  }

  bool ok() const { return error_.success(); }
  ffi::Error error() const { return error_; }
  void fail(const std::string& what) {
    if (ok()) error_ = ffi::Error::InvalidArgument("jax_layernorm's native_cpu " + what);
  }

 private:
  enum Kind { kMatrix, kParameter, kStatistic };

  template <class Array>
  Array take(const char* name, Kind kind) {
    if (!ok()) return {};
    const std::string missing = std::string("was not given ") + name + ".";
    if constexpr (std::is_same_v<Array, In>) {
      if (next_arg_ >= args_.size()) return fail(missing), Array{};
      auto buffer = args_.get<ffi::AnyBuffer>(next_arg_++);
      if (!buffer.has_value()) return fail(missing), Array{};
      return checked<Array>(name, kind, *buffer);
    } else {
      if (next_ret_ >= rets_.size()) return fail(missing), Array{};
      auto buffer = rets_.get<ffi::AnyBuffer>(next_ret_++);
      if (!buffer.has_value()) return fail(missing), Array{};
      return checked<Array>(name, kind, **buffer);
    }
  }

  template <class Array>
  Array checked(const char* name, Kind kind, ffi::AnyBuffer buffer) {
    Array array;
    const auto dims = buffer.dimensions();
    bool fits = true;
    switch (buffer.element_type()) {
      case ffi::DataType::F32: array.dtype = kFloat32; break;
      case ffi::DataType::BF16: array.dtype = kBFloat16; break;
      case ffi::DataType::F16: array.dtype = kFloat16; break;
      case ffi::DataType::F64: array.dtype = kFloat64; break;
      default: fits = false;
    }
    if (kind == kStatistic) {
      fits = fits && dims.size() == 1 && dims[0] == rows_;
    } else {
      fits = fits && dims.size() == 2 && dims[1] == features_;
      if (fits && kind == kMatrix) fits = dims[0] == rows_;
      if (fits && kind == kParameter) {
        array.groups = dims[0];
        fits = dims[0] > 0 && rows_ % dims[0] == 0;
      }
    }
    array.data = buffer.untyped_data();
    if (!fits || array.data == nullptr) {
      fail(std::string("got ") + name + " of " + text_of(buffer) + ", which does not fit " +
           std::to_string(rows_) + " rows of " + std::to_string(features_) +
           " floating-point features.");
      return {};
    }
    return array;
  }

  template <class Array>
  Array expected(Array array, const char* name, Dtype dtype) {
    if (ok() && array.dtype != dtype) {
      fail(std::string("got ") + name + " of a dtype that does not follow from x's.");
    }
    return array;
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  const std::string_view has_;
  const int64_t rows_, features_;
  size_t next_arg_ = 0, next_ret_ = 0;
  ffi::Error error_;
};

// Asks for huge pages under a large result. XLA allocates results anew for each execution,
// and the kernel gives pages at the first write: at 4 KiB each, that takes several times
// as long as the norm. Only advice: where it is not taken nothing changes.
void advise_huge_pages(const Out& out, int64_t elements) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const int64_t bytes = elements * kBytesOf[out.dtype];
  if (out.data == nullptr || bytes < int64_t{4 * kHuge}) return;
  const auto address = reinterpret_cast<uintptr_t>(out.data);
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + bytes) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)out, (void)elements;
#endif
}

// rows, features: those of x, for all else to fit.
std::pair<int64_t, int64_t> shape_of_x(const ffi::RemainingArgs& args) {
  if (args.size() > 0) {
    auto x = args.get<ffi::AnyBuffer>(0);
    if (x.has_value() && x->dimensions().size() == 2) {
      const auto dims = x->dimensions();
      if (dims[0] > 0 && dims[1] > 0) return {dims[0], dims[1]};
    }
  }
  return {-1, -1};  // fits nothing
}

template <class Problem>
ffi::Error run_and_tell(const Problem& problem, ffi::ThreadPool threads) {
  static const RowKernels& kernels = best_kernels();
  XlaPool pool(threads);
  if (run(problem, kernels, pool)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "jax_layernorm's native_cpu ran out of memory.");
}

ffi::Error forward(ffi::ThreadPool threads, std::string_view has, bool center,
                   double epsilon, double scale_offset, ffi::RemainingArgs args,
                   ffi::RemainingRets rets) {
  const auto [rows, features] = shape_of_x(args);
  Reader reader(args, rets, has, rows, features);
  Forward p{};
  p.center = center;
  p.rows = rows;
  p.features = features;
  p.epsilon = epsilon;
  p.scale_offset = scale_offset;
  p.x = reader.matrix("x");
  Dtype normalized = p.x.dtype;
  if (reader.has('r')) {
    p.residual = reader.matrix("residual");
    normalized = promoted(normalized, p.residual.dtype);
  }
  if (reader.has('s')) p.scale = reader.parameter("scale");
  if (reader.has('b')) p.bias = reader.parameter("bias");
  p.y = reader.matrix_out("y");
  if (reader.has('r')) p.total = reader.matrix_out("total", normalized);
  if (reader.has('m')) {
    const Dtype compute = computed(normalized);
    if (center) {
      p.mean = reader.statistic_out("mean", compute);
      p.mean_low = reader.statistic_out("mean_low", compute);
    }
    p.rstd = reader.statistic_out("rstd", compute);
  }
  reader.finish();
  if (!reader.ok()) return reader.error();
  advise_huge_pages(p.y, rows * features);
  advise_huge_pages(p.total, rows * features);
  return run_and_tell(p, threads);
}

ffi::Error backward(ffi::ThreadPool threads, std::string_view has, bool center,
                    double scale_offset, ffi::RemainingArgs args,
                    ffi::RemainingRets rets) {
  const auto [rows, features] = shape_of_x(args);
  Reader reader(args, rets, has, rows, features);
  Backward p{};
  p.center = center;
  p.rows = rows;
  p.features = features;
  p.scale_offset = scale_offset;
  p.x = reader.matrix("x");
  const Dtype compute = computed(p.x.dtype);
  if (reader.has('s')) p.scale = reader.parameter("scale");
  if (center) {
    p.mean = reader.statistic("mean", compute);
    p.mean_low = reader.statistic("mean_low", compute);
  }
  p.rstd = reader.statistic("rstd", compute);
  p.dy = reader.matrix("dy");
  if (reader.has('t')) p.dtotal = reader.matrix("dtotal", p.x.dtype);
  if (reader.has('m')) p.dmean = reader.statistic("dmean", compute);
  if (reader.has('d')) p.drstd = reader.statistic("drstd", compute);
  p.dx = reader.matrix_out("dx", p.x.dtype);
  if (reader.has('S')) p.dscale = reader.parameter_out("dscale", compute);
  if (reader.has('B')) p.dbias = reader.parameter_out("dbias", compute);
  reader.finish();
  reader.nest(p.dscale.groups, p.dbias.groups);
  if (!reader.ok()) return reader.error();
  advise_huge_pages(p.dx, rows * features);
  return run_and_tell(p, threads);
}

}  // namespace
}  // namespace jax_layernorm

// What the library shows; all else is hidden.
#define JLN_PUBLIC extern "C" __attribute__((visibility("default")))
JLN_PUBLIC XLA_FFI_Error* jax_layernorm_forward(XLA_FFI_CallFrame*);
JLN_PUBLIC XLA_FFI_Error* jax_layernorm_backward(XLA_FFI_CallFrame*);
// The version of the FFI that the headers were of: a jaxlib must speak at least this one.
JLN_PUBLIC const int jax_layernorm_ffi_api_version[2];
JLN_PUBLIC const char* jax_layernorm_instruction_set();

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_layernorm_forward, jax_layernorm::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<std::string_view>("has")
                                  .Attr<bool>("center")
                                  .Attr<double>("epsilon")
                                  .Attr<double>("scale_offset")
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_layernorm_backward, jax_layernorm::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attr<std::string_view>("has")
                                  .Attr<bool>("center")
                                  .Attr<double>("scale_offset")
                                  .RemainingArgs()
                                  .RemainingRets());

const int jax_layernorm_ffi_api_version[2] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};

const char* jax_layernorm_instruction_set() {
  return jax_layernorm::best_kernels().name;
}
