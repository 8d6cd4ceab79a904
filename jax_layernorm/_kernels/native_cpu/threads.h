// Chunks of work, claimed by the threads of a pool and by the caller.

#ifndef JAX_LAYERNORM_NATIVE_CPU_THREADS_H_
#define JAX_LAYERNORM_NATIVE_CPU_THREADS_H_

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
  // Runs the task on some thread, at once or much later.
  virtual void schedule(std::function<void()> task) = 0;
};

// Memory that a thread uses for one chunk after the other, and keeps, since giving back
// and getting pages takes longer than a small norm.
class Scratch {
 public:
  static Scratch& of_this_thread() {
    thread_local Scratch scratch;
    return scratch;
  }

  // Of what a thread has no use for, up to a megabyte stays.
  void shrink() {
    for (Buffer& buffer : buffers_) {
      if (buffer.size > kKept) buffer = Buffer();
    }
  }

  void* bytes(int slot, int64_t size) {
    Buffer& buffer = buffers_[slot];
    if (buffer.size < size) {
      buffer = Buffer();  // first, so that both are not held at once
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

// What the threads share. It outlives the call that made it, held by tasks that a busy
// pool gets to late; those find no chunk left and touch nothing else.
//
// Each thread has a run of chunks of its own and then helps with the others': were all to
// claim from one run, they would wait for each other at each page of a new result, which
// the kernel gives at the first write (with huge pages, after clearing 2 MiB).
struct Chunks {
  struct alignas(64) Run {  // a line of the cache
    int64_t end;
    std::atomic<int64_t> next;
  };

  const int64_t count, workers;
  const std::function<void(int64_t, Scratch&)> body;  // refers to the caller's variables
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
    // The others are at their last chunks: a few microseconds, less than sleeping takes.
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

// Calls body(chunk, scratch) for each chunk in 0 .. chunks, on the calling thread and up
// to `helpers` of the pool's. The caller claims chunks too and waits only for those that
// another thread is working on, so that a busy pool delays nothing and no number of calls
// at once can lock each other. False: memory ran out, and the results are not complete.
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
  for (int64_t i = 0; i < helpers; ++i) {
    pool.schedule([shared] { shared->work(); });
  }
  shared->work();
  shared->wait();
  return !shared->out_of_memory.load(std::memory_order_relaxed);
}

}  // namespace jax_layernorm

#endif  // JAX_LAYERNORM_NATIVE_CPU_THREADS_H_
