// The handlers that XLA calls through its foreign function interface (FFI). reader.h
// checks what XLA passes, and norm.cc computes.
//
// The attributes say which of the optional operands and results a call has. Both come in
// the order in which `forward` and `backward`, at the end of this file, read them.

#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "norm.h"
#include "reader.h"
#include "xla/ffi/api/ffi.h"

namespace jax_layernorm {
namespace {

// XLA fills the fields in the order in which their names are registered below.
struct ForwardAttributes {
  bool center, round_before_scale, round_product, round_sum;
  bool has_residual, has_scale, has_bias, with_statistics;
  double epsilon, scale_offset;
};

struct BackwardAttributes {
  bool center, round_before_scale, has_scale, has_dresidual_out, has_dmean, has_drstd;
  bool with_dx, with_dscale, with_dbias;
  double scale_offset;
};

}  // namespace
}  // namespace jax_layernorm

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_layernorm::ForwardAttributes, StructMember<bool>("center"),
    StructMember<bool>("round_before_scale"), StructMember<bool>("round_product"),
    StructMember<bool>("round_sum"), StructMember<bool>("has_residual"),
    StructMember<bool>("has_scale"), StructMember<bool>("has_bias"),
    StructMember<bool>("with_statistics"),
    StructMember<double>("epsilon"), StructMember<double>("scale_offset"));

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_layernorm::BackwardAttributes, StructMember<bool>("center"),
    StructMember<bool>("round_before_scale"), StructMember<bool>("has_scale"),
    StructMember<bool>("has_dresidual_out"),
    StructMember<bool>("has_dmean"), StructMember<bool>("has_drstd"),
    StructMember<bool>("with_dx"), StructMember<bool>("with_dscale"),
    StructMember<bool>("with_dbias"), StructMember<double>("scale_offset"));

namespace jax_layernorm {
namespace {

class XlaPool : public Pool {
 public:
  explicit XlaPool(ffi::ThreadPool pool) : pool_(pool) {}
  int64_t threads() const override { return pool_.num_threads(); }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool pool_;
};

// Asks the operating system for huge pages under a large result. XLA allocates results
// anew for each execution, and the system provides each page at the first write: with
// pages of 4 KiB that takes several times as long as the norm. This is only advice, and
// a system that does not follow it loses nothing but speed.
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

ffi::Error out_of_memory() {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "jax_layernorm's native_cpu ran out of memory.");
}

template <class Problem>
ffi::Error run_on(ffi::ThreadPool threads, const Problem& problem) {
  // The threads of XLA's pool exist only in the process that started them, so a fork of it
  // must not wait for them. A fork of a process that has only imported the package is fine.
  static const pid_t first_called_by = getpid();
  if (getpid() != first_called_by) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      "jax_layernorm's native_cpu was called in a fork of a process that "
                      "had called it, where XLA's threads do not exist. Start processes by "
                      "the spawn or forkserver method.");
  }
  static const RowKernels& kernels = best_kernels();
  XlaPool pool(threads);
  return run(problem, kernels, pool) ? ffi::Error::Success() : out_of_memory();
}

ffi::Error forward(ffi::ThreadPool threads, ForwardAttributes attributes,
                   ffi::RemainingArgs args, ffi::RemainingRets rets) try {
  Reader reader(args, rets);
  ForwardProblem p{};
  p.center = attributes.center;
  p.round_before_scale = attributes.round_before_scale;
  p.round_product = attributes.round_product;
  p.round_sum = attributes.round_sum;
  p.rows = reader.rows();
  p.features = reader.features();
  p.epsilon = attributes.epsilon;
  p.scale_offset = attributes.scale_offset;

  p.x = reader.operand("x", Reader::kMatrix);
  Dtype normalized = p.x.dtype;
  if (attributes.has_residual) {
    p.residual = reader.operand("residual", Reader::kMatrix);
    normalized = promoted(normalized, p.residual.dtype);
  }
  if (attributes.has_scale) p.scale = reader.operand("scale", Reader::kParameter);
  if (attributes.has_bias) p.bias = reader.operand("bias", Reader::kParameter);

  p.y = reader.result("y", Reader::kMatrix);
  if (attributes.has_residual) {
    p.residual_out = reader.result("residual_out", Reader::kMatrix, normalized);
  }
  if (attributes.with_statistics) {
    const Dtype compute = computed(normalized);
    if (attributes.center) {
      p.mean = reader.result("mean", Reader::kStatistic, compute);
      p.mean_low = reader.result("mean_low", Reader::kStatistic, compute);
    }
    p.rstd = reader.result("rstd", Reader::kStatistic, compute);
  }
  reader.finish();
  if (!reader.ok()) return reader.error();

  advise_huge_pages(p.y, p.rows * p.features);
  advise_huge_pages(p.residual_out, p.rows * p.features);
  return run_on(threads, p);
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

ffi::Error backward(ffi::ThreadPool threads, BackwardAttributes attributes,
                    ffi::RemainingArgs args, ffi::RemainingRets rets) try {
  Reader reader(args, rets);
  BackwardProblem p{};
  p.center = attributes.center;
  p.round_before_scale = attributes.round_before_scale;
  p.rows = reader.rows();
  p.features = reader.features();
  p.scale_offset = attributes.scale_offset;

  p.x = reader.operand("x", Reader::kMatrix);
  const Dtype compute = computed(p.x.dtype);
  const auto statistic = [&](const char* name) {
    return reader.operand(name, Reader::kStatistic, compute);
  };
  if (attributes.has_scale) p.scale = reader.operand("scale", Reader::kParameter);
  if (attributes.center) {
    p.mean = statistic("mean");
    p.mean_low = statistic("mean_low");
  }
  p.rstd = statistic("rstd");
  p.dy = reader.operand("dy", Reader::kMatrix);
  if (attributes.has_dresidual_out) {
    p.dresidual_out = reader.operand("dresidual_out", Reader::kMatrix, p.x.dtype);
  }
  if (attributes.has_dmean) p.dmean = statistic("dmean");
  if (attributes.has_drstd) p.drstd = statistic("drstd");

  if (attributes.with_dx) p.dx = reader.result("dx", Reader::kMatrix, p.x.dtype);
  const auto gradient = [&](const char* name) {
    return reader.result(name, Reader::kParameter, compute);
  };
  if (attributes.with_dscale) p.dscale = gradient("dscale");
  if (attributes.with_dbias) p.dbias = gradient("dbias");
  reader.finish();
  const auto [few, many] = std::minmax(p.dscale.groups, p.dbias.groups);
  if (many % few != 0) {
    reader.fail(text("needs groups of rows that nest; got ", p.dscale.groups,
                     " groups of dscale and ", p.dbias.groups, " of dbias"));
  }
  if (!reader.ok()) return reader.error();

  advise_huge_pages(p.dx, p.rows * p.features);
  return run_on(threads, p);
} catch (const std::bad_alloc&) {
  return out_of_memory();
}

}  // namespace
}  // namespace jax_layernorm

// These are the library's public symbols; all others are hidden.
#define JLN_PUBLIC extern "C" __attribute__((visibility("default")))
JLN_PUBLIC XLA_FFI_Error* jax_layernorm_forward(XLA_FFI_CallFrame*);
JLN_PUBLIC XLA_FFI_Error* jax_layernorm_backward(XLA_FFI_CallFrame*);
// The FFI version of the headers used here. A jaxlib needs this version or a newer one.
JLN_PUBLIC const int jax_layernorm_ffi_api_version[2];
// The digest of the sources of all handlers, by which _library.py knows an old library.
JLN_PUBLIC const char jax_layernorm_handlers[65];

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_layernorm_forward, jax_layernorm::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attrs<jax_layernorm::ForwardAttributes>()
                                  .RemainingArgs()
                                  .RemainingRets());

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_layernorm_backward, jax_layernorm::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Attrs<jax_layernorm::BackwardAttributes>()
                                  .RemainingArgs()
                                  .RemainingRets());

const int jax_layernorm_ffi_api_version[2] = {XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
const char jax_layernorm_handlers[65] = JLN_HANDLERS;
