// Reads and checks the operands and results that XLA passes to a handler.

#ifndef JAX_LAYERNORM_KERNELS_NATIVE_CPU_READER_H_
#define JAX_LAYERNORM_KERNELS_NATIVE_CPU_READER_H_

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

#include "norm.h"
#include "xla/ffi/api/ffi.h"

namespace jax_layernorm {

namespace ffi = xla::ffi;

// The dtypes in the order of `enum Dtype`.
constexpr ffi::DataType kXlaDtypes[kDtypes] = {ffi::DataType::F32, ffi::DataType::BF16,
                                               ffi::DataType::F16, ffi::DataType::F64};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

inline std::string text_of(ffi::AnyBuffer buffer) {
  std::string dims;
  for (int64_t n : buffer.dimensions()) dims += text(dims.empty() ? "" : ", ", n);
  return text(buffer.element_type(), " of shape (", dims, ")");
}

// Reads operands and results one after the other, checks each, and remembers the first
// error. After an error all further arrays are empty.
class Reader {
 public:
  enum Kind { kMatrix, kParameter, kStatistic };

  Reader(ffi::RemainingArgs args, ffi::RemainingRets rets) : args_(args), rets_(rets) {
    if (args_.size() == 0) return;
    const auto x = args_.get<ffi::AnyBuffer>(0);
    if (!x.has_value() || x->dimensions().size() != 2) return;
    rows_ = x->dimensions()[0];
    features_ = x->dimensions()[1];
  }

  int64_t rows() const { return rows_; }
  int64_t features() const { return features_; }

  // If `dtype` is not given, the array may have any of the four dtypes.
  In operand(const char* name, Kind kind, std::optional<Dtype> dtype = std::nullopt) {
    if (!ok()) return {};
    if (next_arg_ < args_.size()) {
      const auto buffer = args_.get<ffi::AnyBuffer>(next_arg_++);
      if (buffer.has_value()) return checked<In>(name, kind, dtype, *buffer);
    }
    fail(text("did not get the operand ", name, "; it got ", args_.size(), " operands"));
    return {};
  }

  Out result(const char* name, Kind kind, std::optional<Dtype> dtype = std::nullopt) {
    if (!ok()) return {};
    if (next_ret_ < rets_.size()) {
      auto buffer = rets_.get<ffi::AnyBuffer>(next_ret_++);
      if (buffer.has_value()) return checked<Out>(name, kind, dtype, **buffer);
    }
    fail(text("did not get the result ", name, "; it got ", rets_.size(), " results"));
    return {};
  }

  // To be called after all arrays are read.
  void finish() {
    if (next_arg_ != args_.size()) {
      fail(text("got ", args_.size(), " operands; its attributes describe ", next_arg_));
    }
    if (next_ret_ != rets_.size()) {
      fail(text("got ", rets_.size(), " results; its attributes describe ", next_ret_));
    }
  }

  bool ok() const { return error_.success(); }
  ffi::Error error() const { return error_; }
  void fail(const std::string& what) {
    if (ok()) error_ = ffi::Error::InvalidArgument("jax_layernorm's native_cpu " + what);
  }

 private:
  template <class Array>
  Array checked(const char* name, Kind kind, std::optional<Dtype> dtype,
                ffi::AnyBuffer buffer) {
    const auto* const end = kXlaDtypes + kDtypes;
    const auto* const found = std::find(kXlaDtypes, end, buffer.element_type());
    if (found == end) {
      fail(text("needs ", name, " in F32, BF16, F16 or F64; got ", text_of(buffer)));
    } else if (dtype && *found != kXlaDtypes[*dtype]) {
      fail(text("needs ", name, " in ", kXlaDtypes[*dtype], "; got ", text_of(buffer)));
    }
    const auto dims = buffer.dimensions();
    if (!fits(kind, dims)) {
      fail(text("needs ", name, " of shape ", shape_of(kind), "; got ", text_of(buffer)));
    }
    if (buffer.untyped_data() == nullptr) fail(text("got no memory for ", name));
    if (!ok()) return {};
    const int64_t groups = kind == kParameter ? dims[0] : 1;
    return {buffer.untyped_data(), static_cast<Dtype>(found - kXlaDtypes), groups};
  }

  bool fits(Kind kind, ffi::Span<const int64_t> dims) const {
    if (rows_ <= 0 || features_ <= 0) return false;
    if (kind == kStatistic) return dims.size() == 1 && dims[0] == rows_;
    if (dims.size() != 2 || dims[1] != features_) return false;
    if (kind == kMatrix) return dims[0] == rows_;
    return dims[0] > 0 && rows_ % dims[0] == 0;
  }

  std::string shape_of(Kind kind) const {
    if (rows_ <= 0 || features_ <= 0) return "(rows, features), both above 0";
    if (kind == kStatistic) return text("(", rows_, ")");
    if (kind == kMatrix) return text("(", rows_, ", ", features_, ")");
    return text("(groups, ", features_, "), where groups divides ", rows_);
  }

  ffi::RemainingArgs args_;
  ffi::RemainingRets rets_;
  int64_t rows_ = 0, features_ = 0;  // the shape of x; 0 if x is not a matrix
  size_t next_arg_ = 0, next_ret_ = 0;
  ffi::Error error_;
};

}  // namespace jax_layernorm

#endif  // JAX_LAYERNORM_KERNELS_NATIVE_CPU_READER_H_
