// What the kernels use of a GPU (gpu.cuh), on a CPU: a fiber for each thread, one block or
// cluster after another. emulate.cc has the fibers; it is compiled once for all kernels.
//
// It is strict where a GPU may be lenient: an asynchronous copy spoils its target when it
// begins and copies when it is waited for, and so does what is sent to another block; shared
// memory begins as NaN; warps run in an order that a seed decides, each as far as it gets. It
// is an error if not all threads arrive at a barrier or shuffle, if a block ends before it has
// waited for all that is sent to it, and if an access is outside of the arrays, or of the
// memory of a block that has not begun.

#ifndef JAX_LAYERNORM_TESTS_KERNELS_CUDA_EMULATE_H_
#define JAX_LAYERNORM_TESTS_KERNELS_CUDA_EMULATE_H_

#include <math.h>
#include <stdint.h>
#include <string.h>

using uint16 = uint16_t;
using uint32 = uint32_t;
struct bf16 { uint16 bits; };
struct f16 { uint16 bits; };

#define DEVICE inline
#define KERNEL(threads) extern "C" void
#define CLUSTER_KERNEL(threads, blocks) extern "C" void

namespace emulated {

struct Index { int x; };
Index thread_index();
Index block_index();
Index grid_size();

// The memory of a block of the cluster that runs; of this thread's own without a number.
char* memory(int block);
char* memory();

float exchange(float x, int lanes);  // see shuffle_xor in gpu.cuh
void meet(int id, int threads);      // see barrier in gpu.cuh
void meet_cluster();

// What a block of a cluster waits for: see Arrivals in gpu.cuh. Its memory begins as NaN.
struct alignas(8) Arrivals {
  short begun, parity;
  int expected;  // bytes; -1 until they are known
};
void begin(Arrivals& arrivals);
void expect(Arrivals& arrivals, int bytes);
void send(float* p, Arrivals& arrivals, int block, float a, float b);
void wait_for(Arrivals& arrivals, int parity);

// An asynchronous copy, if `bytes` is more than 2.
void copy(void* to, const void* from, int bytes);
void commit();
void wait(int groups);
void write(void* to, const void* from, int bytes);

struct Launch {
  int blocks, threads, shared_bytes, cluster;
  unsigned seed;
  int arrays;
  void** begins;
  long long* bytes;
};

// Runs a kernel. Returns what is wrong, or "".
const char* run(const Launch& launch, void (*kernel)(void*), void* parameters);

}  // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index())
#define gridDim (emulated::grid_size())
#define block_memory (emulated::memory())

inline float as_float(uint32 bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return as_float(uint32{x.bits} << 16); }
DEVICE float widen(f16 x) {
  _Float16 half;
  memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
}
DEVICE void narrow(float x, float& to) { to = x; }
DEVICE void narrow(float x, bf16& to) {
  uint32 bits;
  memcpy(&bits, &x, 4);
  to.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE void narrow(float x, f16& to) {
  const auto half = static_cast<_Float16>(x);
  memcpy(&to.bits, &half, 2);
}

DEVICE float inverse_root(float x) { return 1.0f / sqrtf(x); }
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

DEVICE float shuffle_xor(float x, int lanes) { return emulated::exchange(x, lanes); }
DEVICE void barrier(int id, int threads) { emulated::meet(id, threads); }

struct alignas(16) Bytes16 { uint32 words[4]; };
struct alignas(8) Bytes8 { uint32 words[2]; };

template <class Bytes>
DEVICE void async_copy(Bytes* to, const Bytes* from) {
  emulated::copy(to, from, sizeof(Bytes));
}
DEVICE void async_commit() { emulated::commit(); }
template <int N>
DEVICE void async_wait() { emulated::wait(N); }
template <class Bytes>
DEVICE void store(Bytes* to, Bytes from) { emulated::write(to, &from, sizeof(Bytes)); }

DEVICE void cluster_barrier() { emulated::meet_cluster(); }
using emulated::Arrivals;
using emulated::begin;
using emulated::expect;
using emulated::send;
using emulated::wait_for;

#endif  // JAX_LAYERNORM_TESTS_KERNELS_CUDA_EMULATE_H_
