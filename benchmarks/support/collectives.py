"""The collectives of a compiled program, from its HLO."""

from __future__ import annotations

import collections
import re
from typing import NamedTuple

from benchmarks.support import hlo_bytes

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
_LINE = re.compile(rf" = (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start)?\(")


class Collective(NamedTuple):
    kind: str
    bytes: int
    """Bytes of the result on one device."""


def of_program(hlo: str) -> list[Collective]:
    """Each collective of `compiled.as_text()` once, even if it is inside a loop."""
    found = []
    for result, kind, start in _LINE.findall(hlo):
        sizes = hlo_bytes._sizes(result, everywhere=True)
        if start and kind != "all-reduce":  # the operand stands before the result
            sizes = sizes[len(sizes) // 2 :] if len(sizes) > 1 else sizes
        found.append(Collective(kind, sum(sizes)))
    return found


def text(found: list[Collective]) -> str:
    """How many of each kind, as in "2 all-reduce, 1 all-gather"."""
    counts = collections.Counter(each.kind for each in found)
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"
