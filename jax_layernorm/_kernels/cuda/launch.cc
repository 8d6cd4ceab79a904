// Launches a kernel that comes with the call, on XLA's stream.
//
// Building this takes XLA's FFI headers and nothing from CUDA. The driver's library,
// which is loaded in every process that uses a GPU, is opened when the first program
// runs.
//
// A kernel's parameters are pointers to the call's operands and results, and one number.

#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace jax_layernorm {
namespace {

namespace ffi = xla::ffi;

// XLA fills the fields in the order in which their names are registered below.
struct LaunchAttributes {
  std::string_view image;   // machine code or PTX
  std::string_view digest;  // identifies the image
  std::string_view kernel;
  int64_t blocks, threads, shared_bytes, number;
  ffi::Span<const int64_t> parameters;  // positions of operands, then results; -1: null
  ffi::Span<const int64_t> sizes;       // of operands, then results, in bytes
};

}  // namespace
}  // namespace jax_layernorm

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_layernorm::LaunchAttributes, StructMember<std::string_view>("image"),
    StructMember<std::string_view>("digest"), StructMember<std::string_view>("kernel"),
    StructMember<int64_t>("blocks"), StructMember<int64_t>("threads"),
    StructMember<int64_t>("shared_bytes"), StructMember<int64_t>("number"),
    StructMember<xla::ffi::Span<const int64_t>>("parameters"),
    StructMember<xla::ffi::Span<const int64_t>>("sizes"));

namespace jax_layernorm {
namespace {

// The part of cuda.h that is used here. In the driver's binary interface, handles are
// pointers and results are integers, and these versions of the functions stay.
using Result = int;
using Stream = struct CUstream_st*;
using Library = struct CUlib_st*;
using Kernel = struct CUkern_st*;
using Function = struct CUfunc_st*;
using Context = struct CUctx_st*;
constexpr int kMaxDynamicSharedBytes = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
constexpr int64_t kSharedBytesWithoutAsking = 48 << 10;

template <class... Parts>
ffi::Error error(ffi::ErrorCode code, const Parts&... parts) {
  std::ostringstream stream;
  stream << "jax_layernorm: ";
  (stream << ... << parts);
  return ffi::Error(code, stream.str());
}

class Driver {
 public:
  static const Driver& get() {
    static const Driver& driver = *new Driver();
    return driver;
  }

  Result (*error_string)(Result, const char**) = nullptr;
  Result (*stream_context)(Stream, Context*) = nullptr;
  Result (*push_context)(Context) = nullptr;
  Result (*pop_context)(Context*) = nullptr;
  Result (*load)(Library*, const void*, int*, void**, unsigned, int*, void**,
                 unsigned) = nullptr;
  Result (*get_kernel)(Kernel*, Library, const char*) = nullptr;
  Result (*get_function)(Function*, Kernel) = nullptr;
  Result (*set_attribute)(Function, int, int) = nullptr;
  Result (*launch)(Function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   unsigned, Stream, void**, void**) = nullptr;

  // Why the driver cannot be used, or "".
  const std::string& missing() const { return missing_; }

  ffi::Error failed(std::string_view what, Result result) const {
    const char* text = nullptr;
    error_string(result, &text);
    return error(ffi::ErrorCode::kInternal, what, ": ", text ? text : "unknown error",
                 " (CUDA's error ", result, ")");
  }

 private:
  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      missing_ = std::string("the CUDA driver does not load: ") + dlerror();
      return;
    }
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr) {
        missing_ = std::string("the CUDA driver is too old, and has no ") + name;
      }
    };
    find(error_string, "cuGetErrorString");
    find(stream_context, "cuStreamGetCtx");
    find(push_context, "cuCtxPushCurrent_v2");
    find(pop_context, "cuCtxPopCurrent_v2");
    find(load, "cuLibraryLoadData");
    find(get_kernel, "cuLibraryGetKernel");
    find(get_function, "cuKernelGetFunction");
    find(set_attribute, "cuFuncSetAttribute");
    find(launch, "cuLaunchKernel");
  }

  std::string missing_;
};

// Makes a context current for a scope.
class Current {
 public:
  explicit Current(Context context) : result(Driver::get().push_context(context)) {}
  ~Current() {
    Context popped;
    if (result == 0) Driver::get().pop_context(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;

  const Result result;
};

// A loaded image. Images stay for the life of the process, because the same few serve
// all its programs, and a client that ends must not unload the images of another
// client.
class Image {
 public:
  static Image& get(std::string_view digest) {
    static std::mutex& mutex = *new std::mutex();
    static auto& images = *new std::map<std::string, std::unique_ptr<Image>, std::less<>>();
    const std::lock_guard<std::mutex> lock(mutex);
    auto found = images.find(digest);
    if (found == images.end()) {
      found = images.emplace(std::string(digest), std::make_unique<Image>()).first;
    }
    return *found->second;
  }

  // The kernel in the current context, which must be `context`.
  ffi::Error function(Context context, const LaunchAttributes& a, Function* function) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = functions_.find(context);
    if (found != functions_.end()) {
      *function = found->second;
      return ffi::Error::Success();
    }
    const Driver& driver = Driver::get();
    if (library_ == nullptr) {
      const std::string image(a.image);  // PTX must end in a zero
      const Result result = driver.load(&library_, image.c_str(), nullptr, nullptr, 0,
                                        nullptr, nullptr, 0);
      if (result != 0) {
        library_ = nullptr;
        return driver.failed("the kernel cannot be loaded", result);
      }
    }
    Kernel kernel;
    const std::string name(a.kernel);
    Result result = driver.get_kernel(&kernel, library_, name.c_str());
    if (result == 0) result = driver.get_function(function, kernel);
    if (result == 0 && a.shared_bytes > kSharedBytesWithoutAsking) {
      result = driver.set_attribute(*function, kMaxDynamicSharedBytes,
                                    static_cast<int>(a.shared_bytes));
    }
    if (result != 0) return driver.failed(name, result);
    functions_[context] = *function;
    return ffi::Error::Success();
  }

 private:
  std::mutex mutex_;
  Library library_ = nullptr;
  std::map<Context, Function> functions_;
};

// The address of each operand and result, checked.
ffi::Error addresses(const LaunchAttributes& a, ffi::RemainingArgs args,
                     ffi::RemainingRets rets, std::vector<void*>* found) {
  constexpr auto kInvalid = ffi::ErrorCode::kInvalidArgument;
  const size_t count = args.size() + rets.size();
  if (a.sizes.size() != count) {
    return error(kInvalid, "the call has ", count, " arrays; it needs ", a.sizes.size());
  }
  for (size_t i = 0; i < count; ++i) {
    ffi::AnyBuffer buffer = i < args.size() ? *args.get<ffi::AnyBuffer>(i)
                                            : **rets.get<ffi::AnyBuffer>(i - args.size());
    const auto bytes = static_cast<int64_t>(buffer.size_bytes());
    if (bytes != a.sizes.begin()[i]) {
      return error(kInvalid, "array ", i, " has ", bytes, " bytes; it needs ",
                   a.sizes.begin()[i]);
    }
    if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 != 0) {
      return error(kInvalid, "array ", i, " is not aligned to 16 bytes");
    }
    found->push_back(buffer.untyped_data());
  }
  for (const int64_t position : a.parameters) {
    if (position < -1 || position >= static_cast<int64_t>(count)) {
      return error(kInvalid, "there is no array ", position);
    }
  }
  constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;
  if (a.blocks < 1 || a.blocks > kMaxBlocks || a.threads < 1 || a.threads > 1024 ||
      a.shared_bytes < 0 || a.shared_bytes > (1 << 20)) {
    return error(kInvalid, "no GPU launches ", a.blocks, " blocks of ", a.threads,
                 " threads with ", a.shared_bytes, " bytes of shared memory");
  }
  return ffi::Error::Success();
}

// XLA runs this twice for each execution. The first time, it loads the kernel and does
// not launch, because no kernel can be loaded while a stream is captured into a graph.
// The second time, it launches.
template <bool kLaunch>
ffi::Error run(Stream stream, LaunchAttributes a, ffi::RemainingArgs args,
               ffi::RemainingRets rets) try {
  const Driver& driver = Driver::get();
  if (!driver.missing().empty()) {
    return error(ffi::ErrorCode::kFailedPrecondition, driver.missing());
  }
  std::vector<void*> pointers;
  if (ffi::Error wrong = addresses(a, args, rets, &pointers); wrong.failure()) return wrong;

  Context context;
  if (const Result result = driver.stream_context(stream, &context)) {
    return driver.failed("the stream has no context", result);
  }
  const Current current(context);
  if (current.result != 0) return driver.failed("the context", current.result);
  Function function;
  if (ffi::Error wrong = Image::get(a.digest).function(context, a, &function);
      wrong.failure()) {
    return wrong;
  }
  if constexpr (kLaunch) {
    void* null = nullptr;
    long long number = a.number;
    std::vector<void*> parameters;
    for (const int64_t i : a.parameters) parameters.push_back(i < 0 ? &null : &pointers[i]);
    parameters.push_back(&number);
    const Result result = driver.launch(
        function, static_cast<unsigned>(a.blocks), 1, 1, static_cast<unsigned>(a.threads),
        1, 1, static_cast<unsigned>(a.shared_bytes), stream, parameters.data(), nullptr);
    if (result != 0) return driver.failed(a.kernel, result);
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return error(ffi::ErrorCode::kResourceExhausted, "the host is out of memory");
}

#ifdef JLN_WITHOUT_STREAM  // tests: XLA for CPUs calls this, and there is no stream
template <bool kLaunch>
ffi::Error run_without_stream(LaunchAttributes a, ffi::RemainingArgs args,
                              ffi::RemainingRets rets) {
  return run<kLaunch>(nullptr, a, args, rets);
}
#define JLN_RUN jax_layernorm::run_without_stream
#define JLN_STREAM
#else
#define JLN_RUN jax_layernorm::run
#define JLN_STREAM .Ctx<xla::ffi::PlatformStream<jax_layernorm::Stream>>()
#endif

}  // namespace
}  // namespace jax_layernorm

#define JLN_BIND(stage)                                          \
  xla::ffi::Ffi::Bind<xla::ffi::ExecutionStage::stage>()         \
      JLN_STREAM.Attrs<jax_layernorm::LaunchAttributes>()        \
      .RemainingArgs()                                           \
      .RemainingRets()

#define JLN_PUBLIC extern "C" __attribute__((visibility("default")))
JLN_PUBLIC XLA_FFI_Error* jax_layernorm_cuda_prepare(XLA_FFI_CallFrame*);
JLN_PUBLIC XLA_FFI_Error* jax_layernorm_cuda_launch(XLA_FFI_CallFrame*);

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_layernorm_cuda_prepare, JLN_RUN<false>,
                              JLN_BIND(kInitialize));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_layernorm_cuda_launch, JLN_RUN<true>, JLN_BIND(kExecute),
                              {xla::ffi::Traits::kCmdBufferCompatible});
