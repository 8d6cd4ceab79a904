"""Medians of interleaved repetitions, so that a drift in speed affects all equally."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    repetitions: int,
    inner: int = 1,
    before: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of one call of each, over rounds in which they take turns.

    Args:
      functions: each is called once beforehand, unmeasured.
      repetitions: rounds.
      inner: how many calls are measured together; more than 1 for short calls.
      before: called before each measurement, unmeasured.
      clock: `time.process_time` adds up the seconds of all threads, without those in
        which another process had the core.
    """
    for function in functions.values():
        before()
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    gc.collect()
    gc.disable()
    try:
        for i in range(repetitions):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                function = functions[name]
                before()
                start = clock()
                for _ in range(inner):
                    function()
                seconds[name].append((clock() - start) / inner)
            gc.collect()
    finally:
        gc.enable()
    return {name: statistics.median(times) for name, times in seconds.items()}
