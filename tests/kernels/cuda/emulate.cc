// The fibers behind emulate.h.

#include "emulate.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <random>
#include <string>
#include <utility>
#include <vector>

namespace emulated {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kGuard = 16;  // bytes after a block's memory
constexpr char kNan = static_cast<char>(0xff);

struct Copy { void* to; const void* from; int bytes; };

struct Thread {
  ucontext_t context;
  int thread, block;
  bool begun, done;
  std::vector<std::vector<Copy>> groups;  // the last is not committed yet
};

struct Sent { char* to; float values[2]; Arrivals* arrivals; };

struct Barrier { int arrived = 0; long generation = 0; };

struct Block {
  std::vector<char> memory;
  Barrier barriers[16];
  std::vector<Barrier> warps;
  std::vector<float> lanes;  // (warps, 2, 32): what is shuffled, in turns
  std::vector<int> turns;    // of each thread
  std::vector<Sent> sent;    // to this block, and not there yet
};

struct State {
  std::vector<Thread> threads;
  std::vector<Block> blocks;  // of the cluster that runs
  Barrier cluster;
  ucontext_t scheduler;
  Thread* now;
  int block_threads, first_block, grid;
  long progress;
  void (*kernel)(void*);
  void* parameters;
  std::string wrong;
  std::vector<std::pair<const char*, const char*>> arrays;
};
State state;

Block& block() { return state.blocks[state.now->block]; }

// A row's elements must lie in one of the arrays.
bool touch(const void* p, int bytes) {
  const char* begin = static_cast<const char*>(p);
  for (const auto& [first, end] : state.arrays) {
    if (first <= begin && begin + bytes <= end) return true;
  }
  state.wrong = "an access outside of all arrays";
  return false;
}

bool aligned(const void* p, int bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return true;
  state.wrong = "an access that is not aligned";
  return false;
}

void yield() {
  Thread* self = state.now;
  swapcontext(&self->context, &state.scheduler);
}

void meet(Barrier& barrier, int count) {
  state.progress++;
  const long generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    barrier.generation++;
  } else {
    while (barrier.generation == generation) yield();
  }
  state.progress++;
}

void body() {
  state.now->begun = true;
  state.kernel(state.parameters);
  state.now->done = true;
  state.progress++;
  yield();
}

// What is wrong with a block after it has run, or "".
std::string left_by(const Block& block) {
  for (const Barrier& barrier : block.barriers) {
    if (barrier.arrived) return "a barrier was left half full";
  }
  for (const Barrier& barrier : block.warps) {
    if (barrier.arrived) return "a shuffle was left half full";
  }
  if (!block.sent.empty()) return "a block ended before all that was sent to it was there";
  for (auto byte = block.memory.end() - kGuard; byte != block.memory.end(); ++byte) {
    if (*byte != kNan) return "a write past the end of shared memory";
  }
  return "";
}

// Runs the cluster whose threads are prepared. Returns what is wrong, or "".
std::string run_cluster(int warps_of_block, unsigned seed, std::mt19937& random) {
  std::vector<int> order(warps_of_block * state.blocks.size());
  for (size_t w = 0; w < order.size(); ++w) order[w] = static_cast<int>(w);
  for (int left = 1; left;) {
    if (seed) std::shuffle(order.begin(), order.end(), random);
    const long before = state.progress;
    left = 0;
    for (const int w : order) {
      const int warp = w % warps_of_block;
      const int base = w / warps_of_block * state.block_threads + warp * 32;
      const int lanes = std::min(32, state.block_threads - warp * 32);
      int running = 0;
      for (long progress = -1; progress != state.progress;) {
        progress = state.progress;
        running = 0;
        for (int lane = 0; lane < lanes; ++lane) {
          Thread& thread = state.threads[base + (seed ? lanes - 1 - lane : lane)];
          if (thread.done) continue;
          state.now = &thread;
          swapcontext(&state.scheduler, &thread.context);
          running += !thread.done;
        }
        if (!state.wrong.empty()) return state.wrong;
      }
      left += running;
    }
    if (left && state.progress == before) return "threads wait for others that never arrive";
  }
  for (const Block& block : state.blocks) {
    if (const std::string wrong = left_by(block); !wrong.empty()) return wrong;
  }
  return "";
}

// Runs a kernel. Returns what is wrong, or "".
std::string run_all(const Launch& launch) {
  const auto [grid, threads, shared_bytes, cluster, seed, arrays, begins, bytes] = launch;
  std::mt19937 random(seed);
  const int count = threads * cluster, warps = (threads + 31) / 32;
  void* stacks = mmap(nullptr, kStack * count, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stacks == MAP_FAILED) return "no memory for stacks";
  state.wrong.clear();
  state.arrays.clear();
  for (int i = 0; i < arrays; ++i) {
    const char* begin = static_cast<const char*>(begins[i]);
    state.arrays.push_back({begin, begin + bytes[i]});
  }
  state.grid = grid;
  state.block_threads = threads;
  std::string wrong;
  for (int first = 0; first < grid && wrong.empty(); first += cluster) {
    state.first_block = first;
    state.cluster = Barrier();
    state.blocks.assign(cluster, Block());
    for (Block& block : state.blocks) {
      block.memory.assign(shared_bytes + kGuard, kNan);
      block.warps.resize(warps);
      block.lanes.resize(warps * 64);
      block.turns.resize(threads);
    }
    state.threads.resize(count);
    for (int i = 0; i < count; ++i) {
      Thread& thread = state.threads[i];
      thread.thread = i % threads;
      thread.block = i / threads;
      thread.begun = thread.done = false;
      thread.groups.assign(1, {});
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = static_cast<char*>(stacks) + kStack * i;
      thread.context.uc_stack.ss_size = kStack;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, body, 0);
    }
    wrong = run_cluster(warps, seed, random);
  }
  munmap(stacks, kStack * count);
  return wrong;
}

}  // namespace

Index thread_index() { return {state.now->thread}; }
Index block_index() { return {state.first_block + state.now->block}; }
Index grid_size() { return {state.grid}; }
char* memory(int block) {
  for (const Thread& thread : state.threads) {
    if (thread.block == block && !thread.begun) {
      state.wrong = "an access of a block that has not begun";
    }
  }
  return state.blocks[block].memory.data();
}
char* memory() { return state.blocks[state.now->block].memory.data(); }

float exchange(float x, int lanes) {
  Block& own = block();
  const int thread = state.now->thread, warp = thread / 32;
  float* values = &own.lanes[warp * 64 + (own.turns[thread]++ & 1) * 32];
  values[thread % 32] = x;
  meet(own.warps[warp], std::min(32, state.block_threads - warp * 32));
  return values[thread % 32 ^ lanes];
}
void meet(int id, int threads) { meet(block().barriers[id], threads); }
void meet_cluster() { meet(state.cluster, static_cast<int>(state.threads.size())); }

void begin(Arrivals& arrivals) { arrivals = {1, 0, -1}; }
void expect(Arrivals& arrivals, int bytes) {
  if (arrivals.begun != 1) state.wrong = "bytes are expected before the count has begun";
  if (arrivals.expected != -1) state.wrong = "bytes are expected twice in a phase";
  arrivals.expected = bytes;
  state.progress++;
}
void send(float* p, Arrivals& arrivals, int block, float a, float b) {
  char* here = memory();
  char* there = memory(block);
  char* to = there + (reinterpret_cast<char*>(p) - here);
  char* counted = there + (reinterpret_cast<char*>(&arrivals) - here);
  if (!aligned(to, 8)) return;
  memset(to, kNan, 8);
  state.blocks[block].sent.push_back({to, {a, b}, reinterpret_cast<Arrivals*>(counted)});
  state.progress++;
}
void wait_for(Arrivals& arrivals, int parity) {
  if (arrivals.begun != 1) state.wrong = "a wait for a count that has not begun";
  auto& sent = block().sent;
  const auto here = [&](const Sent& one) { return one.arrivals == &arrivals; };
  while (arrivals.parity == parity) {
    const int bytes = 8 * static_cast<int>(std::count_if(sent.begin(), sent.end(), here));
    if (arrivals.expected != -1 && bytes > arrivals.expected) {
      state.wrong = "more bytes were sent than were expected";
    }
    if (bytes == arrivals.expected) {
      for (const Sent& one : sent) {
        if (here(one)) memcpy(one.to, one.values, 8);
      }
      sent.erase(std::remove_if(sent.begin(), sent.end(), here), sent.end());
      arrivals.expected = -1;
      arrivals.parity ^= 1;
      state.progress++;
    } else {
      yield();
    }
  }
}

void copy(void* to, const void* from, int bytes) {
  if (!aligned(to, bytes) || !aligned(from, bytes) || !touch(from, bytes)) return;
  if (bytes <= 2) {
    memcpy(to, from, bytes);
  } else {
    memset(to, kNan, bytes);
    state.now->groups.back().push_back({to, from, bytes});
  }
}
void commit() { state.now->groups.emplace_back(); }
void wait(int left) {
  auto& groups = state.now->groups;
  while (groups.size() > static_cast<size_t>(left) + 1) {
    for (const Copy& copy : groups.front()) memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}
void write(void* to, const void* from, int bytes) {
  if (aligned(to, bytes) && touch(to, bytes)) memcpy(to, from, bytes);
}

const char* run(const Launch& launch, void (*kernel)(void*), void* parameters) {
  static std::string wrong;
  state.kernel = kernel;
  state.parameters = parameters;
  wrong = run_all(launch);
  return wrong.c_str();
}

}  // namespace emulated
