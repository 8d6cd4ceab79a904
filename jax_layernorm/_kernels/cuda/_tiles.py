"""How a matrix is cut into blocks of threads, and for which GPU.

A block stays on a multiprocessor for a whole pass and works on `groups` rows at a time,
each with `threads` threads. If a row is too long for one block, each block of a cluster
has a part of it. Only `groups` and `blocks` depend on the number of rows, and a row's
result does not depend on these two.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax


class Gpu(NamedTuple):
    """What the kernels need to know about a GPU.

    Attributes:
      capability: the compute capability times ten, as in sm_90; 0 if it is unknown.
      multiprocessors: the number of multiprocessors; a guess if it is unknown.
    """

    capability: int
    multiprocessors: int

    @property
    def shared_bytes(self) -> int:
        """The bytes of shared memory for a block, without the 1 KiB that CUDA keeps.

        Source: "Technical Specifications per Compute Capability" in the CUDA C++
        Programming Guide.
        """
        known = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
        return (known.get(self.capability, 99) << 10) - 1024

    @property
    def has_clusters(self) -> bool:
        return self.capability >= 90

    def at_once(self, cluster: int) -> int:
        """How many clusters of so many blocks run at once, one block a multiprocessor.

        A cluster lies within a GPC. How many multiprocessors each GPC has differs from one
        H100 to the next, so this assumes the fewest whole ones, as CUTLASS does
        (`get_max_cta_occupancy`). One cluster too many would run alone, after the
        others, and take as long as they. On an H100 with 132 multiprocessors, 15 clusters
        of 8 have been seen to run at once, not 16
        (github.com/accel-sim/gpu-app-collection, pull request 87).
        """
        whole, rest = divmod(self.multiprocessors, GPC)
        return whole * (GPC // cluster) + rest // cluster


GPC = 18
"""The multiprocessors of a whole graphics processing cluster of an H100."""
UNKNOWN = Gpu(0, 108)


@functools.cache
def gpu() -> Gpu:
    """The GPU to lower programs for: this process's, if all of them are alike."""
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return UNKNOWN
    found = set(map(gpu_of, devices))
    return found.pop() if len(found) == 1 else UNKNOWN


def gpu_of(device: Any) -> Gpu:
    """What JAX knows about a device, which may be part of a topology to compile for."""
    return Gpu(int(str(device.compute_capability).replace(".", "")), device.core_count)


class Tile(NamedTuple):
    """One launch of a kernel.

    Attributes:
      threads: the threads of a block for each row that it works on.
      groups: the rows that a block works on at a time.
      vector: the elements that a thread moves at once.
      cluster: the blocks that share a row.
      stages: the stages of the ring that rows arrive in; all but one are under way.
      blocks: the number of blocks in all.
      shared_bytes: the shared memory of a block.
    """

    threads: int
    groups: int
    vector: int
    cluster: int
    stages: int
    blocks: int
    shared_bytes: int

    @property
    def workers(self) -> int:
        """The number of blocks, or clusters of blocks, that work on whole rows."""
        return self.blocks // self.cluster


class Block(NamedTuple):
    """A way to divide a row among the threads of a block.

    Attributes:
      per_thread: the most elements of a row that a thread holds.
      most_threads: the most threads of a block; with fewer, each has more registers.
      row_threads: the most threads of a row.
    """

    per_thread: int
    most_threads: int
    row_threads: int


BLOCKS = {
    "forward": (Block(16, 512, 256), Block(16, 768, 768), Block(32, 512, 512)),
    "backward": (Block(8, 640, 16), Block(8, 768, 96), Block(16, 512, 512)),
}
"""In the order of preference, as measured on an H200 (`benchmarks.cuda_device sweep`).
A block of 512 threads is best if two rows fit into it. A longer row is faster in one block,
with 32 elements a thread, than in a cluster. Backward, a thread also keeps two sums for
each element, and short rows are faster with fewer elements a thread."""
CLUSTERS = (1, 2, 4, 8)
STAGES = 3
FETCH_FIRST = (2, 4, 8)
"""For clusters of these sizes, the backward pass begins to fetch a row before it works on
the row at hand, and otherwise after it. A GPU has timed only the latter, without clusters;
`benchmarks.cuda_device sweep` tries both."""
MOST_GROUPS = 15  # each needs a barrier, except rows of one warp or less


def tile(
    direction: str, rows: int, features: int, read: Sequence[int], widest: int, on: Gpu
) -> Tile | None:
    """The tile of a "forward" or "backward" pass; None if a row is too long.

    Args:
      read: the item sizes of the arrays with whole rows that are read.
      widest: the largest item size of all arrays with whole rows.
    """
    for cluster in CLUSTERS if on.has_clusters else (1,):
        if features % cluster == 0:
            part = features // cluster
            for block in BLOCKS[direction]:
                made = _tile(direction, block, rows, part, cluster, read, widest, on)
                if made is not None:
                    return made
    return None


def _tile(
    direction: str,
    block: Block,
    rows: int,
    part: int,
    cluster: int,
    read: Sequence[int],
    widest: int,
    on: Gpu,
) -> Tile | None:
    """The tile if a block has `part` elements of a row; None if it cannot."""
    vector = math.gcd(part, 16 // widest)
    threads = _threads(part, vector, block.per_thread)
    if threads > block.row_threads:
        return None
    groups, whole_warps = 1, max(1, 32 // threads)
    if cluster == 1:
        groups = block.most_threads // threads
        if threads > 32:
            groups = min(groups, MOST_GROUPS)
        # If there are few rows, take fewer groups, so that all multiprocessors work.
        groups = max(1, min(groups, -(-rows // on.multiprocessors)))
        groups = _round_up(groups, whole_warps)
    row = _round_up(part, threads * vector)
    # Take fewer groups rather than fewer stages: then no fewer bytes are under way, and
    # each thread may have more registers.
    most_groups = groups
    for stages in range(STAGES, 1, -1):
        for groups in range(most_groups, 0, -whole_warps):
            ring = stages * groups * row * sum(read)
            gathered = groups // 2 * 2 * row * 4 if direction == "backward" else 0
            sums = 2 * groups * cluster * max(1, threads // 32) * 8
            sums += 16 if cluster > 1 else 0  # the counts of what has arrived
            needed = _round_up(sums, 16) + _round_up(max(ring, gathered), 16)
            if needed <= on.shared_bytes:
                workers = min(on.at_once(cluster), -(-rows // groups))
                blocks = cluster * max(1, workers)
                return Tile(threads, groups, vector, cluster, stages, blocks, needed)
    return None


def _threads(part: int, vector: int, per_thread: int) -> int:
    """Enough threads for a part of a row: whole warps, or a power of two below 32."""
    vectors = max(1, per_thread // vector)
    threads = -(-part // (vector * vectors))
    if threads < 32:
        return 1 << (threads - 1).bit_length()
    return _round_up(threads, 32)


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
