// How a block of threads holds the rows it works on, and sums over them.
//
// A block works on kGroups rows at a time, each with kThreads threads. If a row is too long
// for one block, each of the kCluster blocks of a cluster holds a part ("part of a row"
// below; without a cluster, the part is the whole row). Thread t holds the elements
//     (v * kThreads + t) * kVector + i        for each v < kVectors and i < kVector
// of its part, so that a warp reads whole lines of memory. Each thread copies its
// elements of the coming rows into its places of a ring in shared memory. No other
// thread reads them, so a thread waits only for the copies that it began.

#ifndef JAX_LAYERNORM_KERNELS_CUDA_ROW_CUH_
#define JAX_LAYERNORM_KERNELS_CUDA_ROW_CUH_

constexpr int kFeatures = JLN_FEATURES;  // elements of a row
constexpr int kCluster = JLN_CLUSTER;    // blocks that share a row
constexpr int kThreads = JLN_THREADS;    // of a block, for a part of a row
constexpr int kGroups = JLN_GROUPS;      // rows of a block at a time
constexpr int kVector = JLN_VECTOR;      // elements that are moved at once
constexpr int kStages = JLN_STAGES;      // of the ring; all but one are under way

constexpr int kPart = kFeatures / kCluster;
constexpr int kBlock = kThreads * kGroups;
constexpr int kVectors = (kPart + kThreads * kVector - 1) / (kThreads * kVector);
constexpr bool kExact = kPart == kVectors * kThreads * kVector;
constexpr int kWarps = kThreads / 32;  // of a part; 0 if several rows share a warp
constexpr float kInvN = 1.0f / kFeatures;
constexpr bool kRound = JLN_ROUND;

static_assert(kFeatures % kCluster == 0 && kPart % kVector == 0, "vectors lie in a part");
static_assert(kWarps ? kThreads % 32 == 0 : 32 % kThreads == 0 && kBlock % 32 == 0,
              "a row has whole warps, or a warp whole rows");
static_assert(kWarps <= 1 || kGroups <= 15, "a block has 16 barriers, one is its own");
static_assert(kCluster == 1 || kGroups == 1, "a cluster works on one row at a time");
static_assert(kCluster == 1 || kCluster * kWarps > 8, "sum_row needs it");

#define UNROLL _Pragma("unroll")
// For each vector v of a thread, and each element i of it.
#define FOR_ELEMENTS(v, i)                \
  UNROLL for (int v = 0; v < kVectors; ++v) \
  UNROLL for (int i = 0; i < kVector; ++i)

using Values = float[kVectors][kVector];

template <int kBytes> struct BytesOf;
template <> struct BytesOf<16> { using Type = Bytes16; };
template <> struct BytesOf<8> { using Type = Bytes8; };
template <> struct BytesOf<4> { using Type = uint32; };
template <> struct BytesOf<2> { using Type = uint16; };

// The stage before this one: it was read in the last turn, and may be fetched into.
DEVICE int before(int stage) { return stage == 0 ? kStages - 1 : stage - 1; }

// Where a thread's vector v begins in its part, and whether the part is that long.
DEVICE int column_of(int v, int t) { return (v * kThreads + t) * kVector; }
DEVICE bool inside(int v, int t) { return kExact || column_of(v, t) < kPart; }

// A thread's elements of a row, as they are in memory.
template <class T>
struct Elements {
  static constexpr int kBytes = sizeof(T) * kVector;
  static constexpr int kPieces = kBytes > 16 ? kBytes / 16 : 1;
  using Bytes = typename BytesOf<kBytes / kPieces>::Type;
  union Vector {
    Bytes bytes[kPieces];
    T items[kVector];
    DEVICE Vector() {}
  };
  Vector vectors[kVectors];

  DEVICE float get(int v, int i) const { return widen(vectors[v].items[i]); }
  DEVICE void set(int v, int i, float x) { narrow(x, vectors[v].items[i]); }

  DEVICE void store_to(T* row, int t) const {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      if (!inside(v, t)) continue;
      Bytes* to = reinterpret_cast<Bytes*>(row + column_of(v, t));
      UNROLL for (int p = 0; p < kPieces; ++p) store(to + p, vectors[v].bytes[p]);
    }
  }
};

// A part of a row in the ring. Each thread has separate places.
template <class T>
struct Arriving {
  using Bytes = typename Elements<T>::Bytes;
  static constexpr int kPieces = Elements<T>::kPieces;
  Bytes bytes[kVectors][kPieces][kThreads];

  DEVICE void fetch(const T* row, int t) {
    UNROLL for (int v = 0; v < kVectors; ++v) {
      if (!inside(v, t)) continue;
      const Bytes* from = reinterpret_cast<const Bytes*>(row + column_of(v, t));
      UNROLL for (int p = 0; p < kPieces; ++p) async_copy(&bytes[v][p][t], from + p);
    }
  }

  DEVICE void read(Elements<T>& to, int t) const {
    UNROLL for (int v = 0; v < kVectors; ++v)
    UNROLL for (int p = 0; p < kPieces; ++p) to.vectors[v].bytes[p] = bytes[v][p][t];
  }

  // Sets the elements past the end of a row, which are never fetched, to 0.
  DEVICE void zero(int t) {
    UNROLL for (int v = 0; v < kVectors; ++v)
    UNROLL for (int p = 0; p < kPieces; ++p) bytes[v][p][t] = Bytes{};
  }
};

template <class T>
DEVICE float rounded(float x) {
  T narrowed;
  narrow(x, narrowed);
  return widen(narrowed);
}

// A thread's elements of a parameter, with `offset` added.
template <class T>
DEVICE void load_parameter(const T* part, int t, float offset, Values& to) {
  FOR_ELEMENTS(v, i) {
    to[v][i] = inside(v, t) ? widen(part[column_of(v, t) + i]) + offset : 0.0f;
    if constexpr (kRound) to[v][i] = rounded<T>(to[v][i]);
  }
}

struct alignas(8) Two { float a, b; };

// The sums of each group's warps in all blocks of a cluster; each block has them in its
// memory. There are two sets, which are used in turns.
struct WarpSums {
  Two of[2][kGroups][kCluster * (kWarps ? kWarps : 1)];
#if JLN_CLUSTER > 1
  Arrivals arrived[2];
#endif
};

// All threads call this before the first sum over a row.
DEVICE void begin_cluster(WarpSums& sums) {
#if JLN_CLUSTER > 1
  if (threadIdx.x == 0) {
    for (Arrivals& arrived : sums.arrived) begin(arrived);
  }
  cluster_barrier();  // no block may send to one that has not begun
#endif
}

DEVICE void sum_lanes(Two& x, int lanes) {
  UNROLL for (int n = lanes / 2; n > 0; n /= 2) {
    x.a += shuffle_xor(x.a, n);
    x.b += shuffle_xor(x.b, n);
  }
}

// Two sums over a row. All threads of the row get the same sums, in an order that only
// kThreads and kCluster decide. `turn` counts the calls, modulo 4 or, without a cluster, 2.
//
// A set of sums is free again at the call after next: in the call between, a thread waits
// for all warps of the row, and each of them has read the set before it takes part in that
// call. So a block has received all that was sent to it when its last call returns, and
// may end. In a cluster, sending orders nothing that was read before it; but with more than
// 8 parts a warp cannot send before its lanes have exchanged what they read.
DEVICE Two sum_row(Two x, WarpSums& sums, int turn, int group, int t, int rank) {
  constexpr int parts = kCluster * kWarps;
  sum_lanes(x, kThreads < 32 ? kThreads : 32);
  if constexpr (parts > 1) {
    const int set = kCluster > 1 ? turn & 1 : turn;
    Two* all = sums.of[set][group];
#if JLN_CLUSTER > 1
    Arrivals& arrived = sums.arrived[set];
    if (t == 0) expect(arrived, parts * sizeof(Two));
    if (t % 32 < kCluster) send(&all[rank * kWarps + t / 32].a, arrived, t % 32, x.a, x.b);
    wait_for(arrived, turn >> 1 & 1);
#else
    if (t % 32 == 0) all[t / 32] = x;
    barrier(1 + group, kThreads);
#endif
    x = {0.0f, 0.0f};
    if constexpr (parts <= 8) {
      UNROLL for (int w = 0; w < parts; ++w) {
        x.a += all[w].a;
        x.b += all[w].b;
      }
    } else {
      for (int w = t % 32; w < parts; w += 32) {
        x.a += all[w].a;
        x.b += all[w].b;
      }
      sum_lanes(x, 32);
    }
  }
  return x;
}

// Which rows a thread works on: row `first + group`, and every `step`th row after it.
struct Place {
  int group = threadIdx.x / kThreads;
  int t = threadIdx.x % kThreads;
  int rank = kCluster > 1 ? blockIdx.x % kCluster : 0;  // of the block in its cluster
  long long worker = blockIdx.x / kCluster;             // the number of the block or cluster
  int step = gridDim.x / kCluster * kGroups;
  long long first = worker * kGroups;

  template <class T>
  DEVICE T* part_of(T* matrix, long long row) const {
    return matrix + row * kFeatures + rank * kPart;
  }
};

#endif  // JAX_LAYERNORM_KERNELS_CUDA_ROW_CUH_
