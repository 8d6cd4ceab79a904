// Vectors of the widest registers that this translation unit is compiled for, and loads
// and stores that convert between the four dtypes and the dtype of the arithmetic.
//
// The vector extensions of GCC and Clang let the same source serve SSE2, AVX2, AVX-512 and
// NEON. Intrinsics appear only if the compilers do not find the instruction. Everything
// has internal linkage, because the linker must not take a function that was compiled
// for AVX-512 in place of the same function compiled for the baseline.

#ifndef JAX_LAYERNORM_KERNELS_NATIVE_CPU_SIMD_H_
#define JAX_LAYERNORM_KERNELS_NATIVE_CPU_SIMD_H_

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__)
#define JLN_AVX512 1
#else
#define JLN_AVX512 0
#endif

#define JLN_INLINE inline __attribute__((always_inline))

namespace jax_layernorm {
namespace {

#if JLN_AVX512
constexpr int kRegister = 64;
#elif defined(__AVX2__)
constexpr int kRegister = 32;
#else
constexpr int kRegister = 16;
#endif

// The two half-precision dtypes in memory. The arithmetic never uses these bits directly.
struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

template <class T> struct BitsOf;
template <> struct BitsOf<float> { using type = uint32_t; };
template <> struct BitsOf<double> { using type = uint64_t; };
template <> struct BitsOf<BFloat16> { using type = uint16_t; };
template <> struct BitsOf<Float16> { using type = uint16_t; };
template <class T> using Bits = typename BitsOf<T>::type;

// The number of elements of type C (float or double) in a register.
template <class C> constexpr int kLanes = kRegister / int{sizeof(C)};
template <class C> using Register = Vector<C, kLanes<C>>;

template <class To, class From>
JLN_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class C>
JLN_INLINE V all(C value) {
  return value - V{};  // value - 0, so that -0 stays -0
}

// a * b + c, rounded once if the processor has an instruction for it. The compiler must
// not choose (-ffp-contract=off), because it could choose differently in two instances of
// one formula, and then a row's bits would depend on how many rows are taken together.
template <class V>
JLN_INLINE V multiply_add(V a, V b, V c) {
#if JLN_AVX512
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 4) {
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else if constexpr (sizeof(V) == 64) {
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
#elif defined(__FMA__)
  if constexpr (sizeof(V) == 32 && sizeof(a[0]) == 4) {
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else if constexpr (sizeof(V) == 32) {
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#elif defined(__aarch64__)
  for (size_t i = 0; i < sizeof(V) / sizeof(a[0]); ++i) {
    if constexpr (sizeof(a[0]) == 4) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    else c[i] = __builtin_fma(a[i], b[i], c[i]);
  }
  return c;
#endif
  return a * b + c;
}

// Keeps the first n lanes and sets the others to 0, even if they are NaN or inf.
template <class C>
JLN_INLINE Register<C> first(Register<C> v, int n) {
#if JLN_AVX512
  const uint32_t mask = (uint32_t{1} << n) - 1;
  if constexpr (sizeof(C) == 4) {
    return (Register<C>)_mm512_maskz_mov_ps(static_cast<__mmask16>(mask), (__m512)v);
  } else {
    return (Register<C>)_mm512_maskz_mov_pd(static_cast<__mmask8>(mask), (__m512d)v);
  }
#else
  for (int i = n; i < kLanes<C>; ++i) v[i] = 0;
  return v;
#endif
}

// ---- half precision ---------------------------------------------------------------

// GCC converts integers to another width in two halves, although one instruction can do
// it.
template <int N>
JLN_INLINE Vector<uint32_t, N> widen_integers(Vector<uint16_t, N> v) {
#if JLN_AVX512
  if constexpr (N == 16) return (Vector<uint32_t, N>)_mm512_cvtepu16_epi32((__m256i)v);
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) return (Vector<uint32_t, N>)_mm256_cvtepu16_epi32((__m128i)v);
#endif
  return __builtin_convertvector(v, Vector<uint32_t, N>);
}

// The integers must be below 2**16.
template <int N>
JLN_INLINE Vector<uint16_t, N> narrow_integers(Vector<uint32_t, N> v) {
#if JLN_AVX512
  if constexpr (N == 16) return (Vector<uint16_t, N>)_mm512_cvtepi32_epi16((__m512i)v);
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) {
    const __m256i packed = _mm256_packus_epi32((__m256i)v, (__m256i)v);
    return (Vector<uint16_t, N>)_mm256_castsi256_si128(
        _mm256_permute4x64_epi64(packed, 0b1000));
  }
#endif
  return __builtin_convertvector(v, Vector<uint16_t, N>);
}

template <int N>
JLN_INLINE Vector<float, N> widen_bfloat16(Vector<uint16_t, N> bits) {
  return bit_cast<Vector<float, N>>(widen_integers<N>(bits) << 16);
}

// Rounds to nearest, ties to even. NaN becomes a quiet NaN.
template <int N>
JLN_INLINE Vector<uint16_t, N> round_to_bfloat16(Vector<float, N> v) {
  using U = Vector<uint32_t, N>;
  const U bits = bit_cast<U>(v);
  const U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const U quiet = (bits >> 16) | 0x40;
  return narrow_integers<N>(v == v ? rounded : quiet);
}

template <int N>
JLN_INLINE Vector<float, N> widen_float16(Vector<uint16_t, N> bits) {
#if JLN_AVX512
  if constexpr (N == 16) return (Vector<float, N>)_mm512_cvtph_ps((__m256i)bits);
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return (Vector<float, N>)_mm256_cvtph_ps((__m128i)bits);
#endif
  // The exponent moves by 127 - 15. A denormal gets the exponent of 2**-14, which is then
  // subtracted: XLA's threads take float32 denormals for 0 (FTZ and DAZ), and none appears
  // in this way. inf and NaN get the largest exponent again.
  using U = Vector<uint32_t, N>;
  const U wide = widen_integers<N>(bits);
  const U magnitude = (wide & 0x7fff) << 13;
  const U denormal = bit_cast<U>(
      bit_cast<Vector<float, N>>(magnitude + (113u << 23)) - 0x1p-14f);
  U result = magnitude < (1u << 23) ? denormal : magnitude + (112u << 23);
  result = magnitude >= (0x7c00u << 13) ? result | 0x7f800000u : result;
  return bit_cast<Vector<float, N>>(result | ((wide & 0x8000) << 16));
}

template <int N>
JLN_INLINE Vector<uint16_t, N> round_to_float16(Vector<float, N> v) {
#if JLN_AVX512
  if constexpr (N == 16) {
    return (Vector<uint16_t, N>)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
  }
#endif
#if defined(__F16C__)
  if constexpr (N == 8) {
    return (Vector<uint16_t, N>)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  }
#endif
  using U = Vector<uint32_t, N>;
  const U bits = bit_cast<U>(v);
  const U sign = (bits >> 16) & 0x8000;
  const U magnitude = bits & 0x7fffffff;
  // Normal results: round the last 13 bits, ties to even, and move the exponent.
  const U normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  // Denormal results: adding 0.5 aligns the last bit of the sum to 2**-24.
  const U denormal =
      bit_cast<U>(bit_cast<Vector<float, N>>(magnitude) + 0.5f) - 0x3f000000u;
  U result = magnitude < (113u << 23) ? denormal : normal;
  result = magnitude >= 0x477ff000u ? (U{} + 0x7c00) : result;  // 65520 and above
  result = magnitude > 0x7f800000u ? (U{} + 0x7e00) : result;   // NaN
  return narrow_integers<N>(result | sign);
}

// ---- loads and stores --------------------------------------------------------------

// Loads N elements from any address.
template <class T, int N>
JLN_INLINE Vector<Bits<T>, N> load_bits(const T* from) {
  Vector<Bits<T>, N> bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

// Loads n elements, sets the other lanes to 0, and reads no byte beyond the elements.
template <class T, int N>
JLN_INLINE Vector<Bits<T>, N> load_bits(const T* from, int n) {
  using V = Vector<Bits<T>, N>;
#if JLN_AVX512
  const uint32_t mask = (uint32_t{1} << n) - 1;
  if constexpr (sizeof(T) == 8 && N == 8) return (V)_mm512_maskz_loadu_epi64(mask, from);
  if constexpr (sizeof(T) == 4 && N == 16) return (V)_mm512_maskz_loadu_epi32(mask, from);
  if constexpr (sizeof(T) == 4 && N == 8) return (V)_mm256_maskz_loadu_epi32(mask, from);
  if constexpr (sizeof(T) == 2 && N == 16) return (V)_mm256_maskz_loadu_epi16(mask, from);
  if constexpr (sizeof(T) == 2 && N == 8) return (V)_mm_maskz_loadu_epi16(mask, from);
#endif
  V bits{};
  for (int i = 0; i < n; ++i) {
    Bits<T> one;
    std::memcpy(&one, from + i, sizeof one);
    bits[i] = one;
  }
  return bits;
}

template <class T, int N>
JLN_INLINE void store_bits(T* to, Vector<Bits<T>, N> bits, int n) {
#if JLN_AVX512
  const uint32_t mask = (uint32_t{1} << n) - 1;
  if constexpr (sizeof(T) == 8 && N == 8) {
    return _mm512_mask_storeu_epi64(to, mask, (__m512i)bits);
  } else if constexpr (sizeof(T) == 4 && N == 16) {
    return _mm512_mask_storeu_epi32(to, mask, (__m512i)bits);
  } else if constexpr (sizeof(T) == 4 && N == 8) {
    return _mm256_mask_storeu_epi32(to, mask, (__m256i)bits);
  } else if constexpr (sizeof(T) == 2 && N == 16) {
    return _mm256_mask_storeu_epi16(to, mask, (__m256i)bits);
  } else if constexpr (sizeof(T) == 2 && N == 8) {
    return _mm_mask_storeu_epi16(to, mask, (__m128i)bits);
  }
#endif
  for (int i = 0; i < n; ++i) {
    const Bits<T> one = bits[i];
    std::memcpy(to + i, &one, sizeof one);
  }
}

template <class C, class T, int N = kLanes<C>>
JLN_INLINE Register<C> from_bits(Vector<Bits<T>, N> bits) {
  if constexpr (sizeof(T) == 2) {
    Vector<float, N> wide;
    if constexpr (sizeof(T) == 2 && __is_same(T, BFloat16)) {
      wide = widen_bfloat16<N>(bits);
    } else {
      wide = widen_float16<N>(bits);
    }
    return __builtin_convertvector(wide, Register<C>);
  } else {
    return __builtin_convertvector((bit_cast<Vector<T, N>>(bits)), Register<C>);
  }
}

template <class T, class C, int N = kLanes<C>>
JLN_INLINE Vector<Bits<T>, N> to_bits(Register<C> v) {
  if constexpr (sizeof(T) == 2) {
    const auto narrow = __builtin_convertvector(v, Vector<float, N>);
    if constexpr (__is_same(T, BFloat16)) return round_to_bfloat16<N>(narrow);
    else return round_to_float16<N>(narrow);
  } else {
    return bit_cast<Vector<Bits<T>, N>>(__builtin_convertvector(v, Vector<T, N>));
  }
}

// Which elements of a register a step of a loop takes: all of them, or the first n.
struct Whole {};
struct Part { int n; };

template <class C, class T>
JLN_INLINE Register<C> load(const T* from, Whole) {
  return from_bits<C, T>(load_bits<T, kLanes<C>>(from));
}
template <class C, class T>
JLN_INLINE Register<C> load(const T* from, Part part) {
  return from_bits<C, T>(load_bits<T, kLanes<C>>(from, part.n));
}

template <class C, class T>
JLN_INLINE void store(T* to, Register<C> v, Whole) {
  const auto bits = to_bits<T, C>(v);
  std::memcpy(to, &bits, sizeof bits);
}
template <class C, class T>
JLN_INLINE void store(T* to, Register<C> v, Part part) {
  store_bits<T, kLanes<C>>(to, to_bits<T, C>(v), part.n);
}

template <class C> JLN_INLINE Register<C> only(Register<C> v, Whole) { return v; }
template <class C> JLN_INLINE Register<C> only(Register<C> v, Part part) {
  return first<C>(v, part.n);
}

// Rounds to a dtype T that is no wider than C.
template <class T, class C>
JLN_INLINE Register<C> round_to(Register<C> v) {
  return from_bits<C, T>(to_bits<T, C>(v));
}

// The sum of the lanes, added pairwise as in a tree.
template <class C, int N>
JLN_INLINE C sum_of_lanes(Vector<C, N> v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    struct { Vector<C, N / 2> low, high; } halves;
    std::memcpy(&halves, &v, sizeof v);
    return sum_of_lanes<C, N / 2>(halves.low + halves.high);
  }
}

}  // namespace
}  // namespace jax_layernorm

#endif  // JAX_LAYERNORM_KERNELS_NATIVE_CPU_SIMD_H_
