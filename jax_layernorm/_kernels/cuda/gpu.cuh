// What the kernels use of a GPU. tests/kernels/cuda/emulate.h defines the same names for a
// CPU, so that their values can be checked where there is no GPU.

#ifndef JAX_LAYERNORM_KERNELS_CUDA_GPU_CUH_
#define JAX_LAYERNORM_KERNELS_CUDA_GPU_CUH_

using uint16 = unsigned short;
using uint32 = unsigned int;
struct bf16 { uint16 bits; };
struct f16 { uint16 bits; };

#define DEVICE __device__ __forceinline__
// The kernels take all registers that a block of this many threads can have.
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads, 1)
#define CLUSTER_KERNEL(threads, blocks) KERNEL(threads) __cluster_dims__(blocks, 1, 1)

extern __shared__ __align__(16) char block_memory[];

DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return __uint_as_float(uint32{x.bits} << 16); }
DEVICE float widen(f16 x) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
}
DEVICE void narrow(float x, float& to) { to = x; }
DEVICE void narrow(float x, bf16& to) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}
DEVICE void narrow(float x, f16& to) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
}

DEVICE float inverse_root(float x) { return 1.0f / sqrtf(x); }
DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

// The value of the thread whose lane differs in these bits. The whole warp calls it.
DEVICE float shuffle_xor(float x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}

// Waits for this many threads of the block, at one of its 16 barriers.
DEVICE void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

struct alignas(16) Bytes16 { uint32 words[4]; };
struct alignas(8) Bytes8 { uint32 words[2]; };

DEVICE uint32 shared_address(const void* p) {
  return static_cast<uint32>(__cvta_generic_to_shared(p));
}

// Begins to copy from global to shared memory. There is no asynchronous copy of 2 bytes.
DEVICE void async_copy(Bytes16* to, const Bytes16* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)),
               "l"(from) : "memory");
}
DEVICE void async_copy(Bytes8* to, const Bytes8* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(shared_address(to)),
               "l"(from) : "memory");
}
DEVICE void async_copy(uint32* to, const uint32* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)),
               "l"(from) : "memory");
}
DEVICE void async_copy(uint16* to, const uint16* from) { *to = __ldg(from); }

// The copies that were begun since the last commit are one group. Waiting for all but N
// groups makes this thread's copies visible to this thread.
DEVICE void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
DEVICE void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

DEVICE void store(Bytes16* to, Bytes16 from) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(from.words[0]),
               "r"(from.words[1]), "r"(from.words[2]), "r"(from.words[3]) : "memory");
}
DEVICE void store(Bytes8* to, Bytes8 from) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(from.words[0]),
               "r"(from.words[1]) : "memory");
}
DEVICE void store(uint32* to, uint32 from) { *to = from; }
DEVICE void store(uint16* to, uint16 from) { *to = from; }

#if __CUDA_ARCH__ >= 900
// Waits for all threads of the cluster.
DEVICE void cluster_barrier() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}

// Counts the bytes that blocks of the cluster send to this block (PTX: an mbarrier). A phase
// ends when one thread has called `expect`, and all bytes that it expects are there.
struct alignas(8) Arrivals { unsigned long long state; };

// One thread calls this once, before a cluster_barrier.
DEVICE void begin(Arrivals& arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\n\tfence.mbarrier_init.release.cluster;"
               ::"r"(shared_address(&arrivals)) : "memory");
}
DEVICE void expect(Arrivals& arrivals, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               ::"r"(shared_address(&arrivals)), "r"(bytes) : "memory");
}

// Stores two floats at the address that `p` has in the memory of another block, and counts
// them there. Unlike cluster_barrier, it does not wait for what the thread has stored
// before, which takes as long as the way to the memory of the GPU and back.
DEVICE void send(float* p, Arrivals& arrivals, int block, float a, float b) {
  asm volatile("{\n\t.reg .b32 to, counted;\n\t"
               "mapa.shared::cluster.u32 to, %0, %2;\n\t"
               "mapa.shared::cluster.u32 counted, %1, %2;\n\t"
               "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32"
               " [to], {%3, %4}, [counted];\n\t}"
               ::"r"(shared_address(p)), "r"(shared_address(&arrivals)), "r"(block), "f"(a),
               "f"(b) : "memory");
}

// Waits for the end of a phase. `parity` is 0 for the first phase, 1 for the second, and so on
// in turns.
DEVICE void wait_for(Arrivals& arrivals, int parity) {
  uint32 ended;
  do {
    asm volatile("{\n\t.reg .pred p;\n\t"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n\t"
                 "selp.u32 %0, 1, 0, p;\n\t}"
                 : "=r"(ended) : "r"(shared_address(&arrivals)), "r"(parity) : "memory");
  } while (!ended);
}
#endif

#endif  // JAX_LAYERNORM_KERNELS_CUDA_GPU_CUH_
