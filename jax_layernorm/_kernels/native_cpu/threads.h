// Divides work into chunks, which the threads of a pool and the caller claim.

#ifndef JAX_LAYERNORM_KERNELS_NATIVE_CPU_THREADS_H_
#define JAX_LAYERNORM_KERNELS_NATIVE_CPU_THREADS_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <new>

namespace jax_layernorm {

class Pool {
 public:
  virtual ~Pool() = default;
  virtual int64_t threads() const = 0;
  // Runs the task on a thread of the pool, now or much later.
  virtual void schedule(std::function<void()> task) = 0;
};

// Memory that a thread uses for one chunk after the other. The thread keeps it, because
// returning pages to the system and getting them again takes longer than a small norm.
class Scratch {
 public:
  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

  // An idle thread keeps up to a megabyte: kKept bytes in each buffer.
  void shrink() {
    for (Buffer& buffer : buffers_) {
      if (buffer.size > kKept) buffer = Buffer();
    }
  }

  void* bytes(int slot, int64_t size) {
    Buffer& buffer = buffers_[slot];
    if (buffer.size < size) {
      buffer = Buffer();  // free the old memory before getting the new
      buffer.data.reset(new char[size]);
      buffer.size = size;
    }
    return buffer.data.get();
  }

 private:
  static constexpr int64_t kKept = 256 * 1024;
  struct Buffer {
    std::unique_ptr<char[]> data;
    int64_t size = 0;
  };
  Buffer buffers_[4];
};

namespace internal {

// The state that the threads of one call share. A busy pool may run a task after the call
// has returned, so each task holds a reference to the state. A late task finds that all
// chunks are claimed and touches nothing else.
//
// Each thread starts with its own run of chunks and then helps with the runs of the others.
// If all threads claimed chunks from one run, they would wait for each other at each page
// of a new result, because the operating system provides a page at the first write (and
// clears 2 MiB if it is a huge page).
struct Chunks {
  struct alignas(64) Run {  // one cache line
    int64_t end;
    std::atomic<int64_t> next;
  };

  const int64_t count, workers;
  const std::function<void(int64_t, Scratch&)> body;  // refers to variables of the caller
  const std::unique_ptr<Run[]> runs;
  std::atomic<int64_t> started{0};
  std::atomic<int64_t> done{0};
  std::atomic<bool> out_of_memory{false};
  std::mutex mutex;
  std::condition_variable all_done;

  template <class Body>
  Chunks(int64_t count, int64_t workers, const Body& body)
      : count(count), workers(workers), body(std::cref(body)), runs(new Run[workers]) {
    for (int64_t i = 0; i < workers; ++i) {
      runs[i].next.store(count * i / workers, std::memory_order_relaxed);
      runs[i].end = count * (i + 1) / workers;
    }
  }

  void work() {
    Scratch& scratch = Scratch::of_this_thread();
    const int64_t first = started.fetch_add(1, std::memory_order_relaxed);
    int64_t own = 0;
    for (int64_t k = 0; k < workers; ++k) {
      Run& run = runs[(first + k) % workers];
      for (int64_t i;
           (i = run.next.fetch_add(1, std::memory_order_relaxed)) < run.end; ++own) {
        try {
          body(i, scratch);
        } catch (const std::bad_alloc&) {
          out_of_memory.store(true, std::memory_order_relaxed);
        }
      }
    }
    if (own != 0) scratch.shrink();
    if (own != 0 && done.fetch_add(own, std::memory_order_acq_rel) + own == count) {
      std::lock_guard<std::mutex> lock(mutex);
      all_done.notify_all();
    }
  }

  void wait() {
    // The other threads are at their last chunks, which take a few microseconds. That is
    // less than the time to sleep and wake.
    for (int i = 0; i < 4000; ++i) {
      if (done.load(std::memory_order_acquire) == count) return;
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
    std::unique_lock<std::mutex> lock(mutex);
    all_done.wait(lock,
                  [&] { return done.load(std::memory_order_acquire) == count; });
  }
};

}  // namespace internal

// Calls body(chunk, scratch) for each chunk from 0 to chunks - 1, on the calling thread and
// on up to `helpers` threads of the pool. The caller claims chunks too, and waits only for
// chunks that another thread is working on. So a busy pool delays nothing, and concurrent
// calls cannot deadlock. Returns false if memory ran out; the results are then incomplete.
template <class Body>
bool parallel_for(Pool& pool, int64_t chunks, int64_t helpers, const Body& body) {
  helpers = std::min({helpers, chunks - 1, pool.threads() - 1});
  if (helpers <= 0) {
    Scratch& scratch = Scratch::of_this_thread();
    try {
      for (int64_t i = 0; i < chunks; ++i) body(i, scratch);
      scratch.shrink();
    } catch (const std::bad_alloc&) {
      return false;
    }
    return true;
  }
  auto shared = std::make_shared<internal::Chunks>(chunks, helpers + 1, body);
  try {
    for (int64_t i = 0; i < helpers; ++i) {
      pool.schedule([shared] { shared->work(); });
    }
  } catch (const std::bad_alloc&) {
    // It goes on with fewer helpers. It must not return before they have ended, because
    // they use `body`.
  }
  shared->work();
  shared->wait();
  return !shared->out_of_memory.load(std::memory_order_relaxed);
}

}  // namespace jax_layernorm

#endif  // JAX_LAYERNORM_KERNELS_NATIVE_CPU_THREADS_H_
