"""How many bytes a compiled program moves to and from device memory, from its HLO.

Every instruction that runs (a fusion, a library call, a copy) counts each operand and
each result once, even if the kernel reads it twice. An array that a kernel only slices,
or updates in place, counts as that part of it. An array that the compiler keeps in fast
memory (`S(1)` on TPU) does not count. The body of a loop counts as often as it runs, if
the program says how often. XLA's `cost_analysis` is not enough: it sees no custom
kernel, and counts the body of a loop once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_ITEMSIZE = {
    "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_MOVES_NOTHING = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "constant", "after-all",
    "copy-done", "slice-done", "async-done", "all-reduce-done", "all-gather-done",
    "partition-id", "opt-barrier", "iota",
}  # fmt: skip
_STARTS = {"copy-start", "slice-start", "async-start"}
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


def total(hlo: str, trips: int = 1) -> int:
    """Bytes of one run of the program `compiled.as_text()`.

    Args:
      trips: how often a loop runs if the program does not say, as on TPU.
    """
    named = computations(hlo)
    return _of(named["ENTRY"], named, trips)


def kernels(hlo: str) -> list[tuple[str, int]]:
    """Name and bytes of each instruction that the entry computation executes."""
    named = computations(hlo)
    return list(_instructions(named["ENTRY"], named, 1))


def loop_trips(while_instruction: str, otherwise: int) -> int:
    found = re.search(r'known_trip_count":\{"n":"(\d+)"', while_instruction)
    return int(found.group(1)) if found else otherwise


def _of(lines: list[str], computations: dict[str, list[str]], trips: int) -> int:
    return sum(nbytes for _, nbytes in _instructions(lines, computations, trips))


def _instructions(
    lines: list[str], computations: dict[str, list[str]], trips: int
) -> Iterator[tuple[str, int]]:
    types: dict[str, str] = {}
    for line in lines:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, result, op, rest = match.groups()
        types[name] = result
        operands, attributes = _split(rest)
        if op in _MOVES_NOTHING:
            continue
        called = re.findall(r"(?:body|to_apply|calls)=%([\w.\-]+)", attributes)
        read = [types.get(o, "") for o in dict.fromkeys(_names(operands))]
        if op in ("while", "call", "conditional"):
            inside = sum(_of(computations[c], computations, trips) for c in called)
            yield name, inside * (loop_trips(attributes, trips) if op == "while" else 1)
        elif op in _STARTS:  # the result is (source, destination, context), or reversed
            moved = min(_sizes(result, everywhere=True)[:2])
            yield name, sum(moved for size in _sizes(result)[:2] if size)
        elif op in ("slice", "dynamic-slice"):
            yield name, 2 * sum(_sizes(result))
        elif op == "dynamic-update-slice":
            yield name, 2 * sum(_sizes(types.get(_names(operands)[1], "")))
        elif op == "fusion":
            yield name, _of_fusion(operands, types, result, computations[called[0]])
        else:
            yield name, sum(sum(_sizes(t)) for t in [*read, result])


def _of_fusion(
    operands: str, types: dict[str, str], result: str, inside: list[str]
) -> int:
    """Operands and results, or only the part of one that is sliced or updated in place."""
    uses: dict[str, list[tuple[str, str, list[str]]]] = {}
    own: dict[str, str] = {}
    position: dict[str, int] = {}
    for line in inside:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, type_, op, rest = match.groups()
        own[name] = type_
        if op == "parameter":
            position[name] = int(rest.partition(")")[0])
        arguments = _names(_split(rest)[0])
        for argument in arguments:
            uses.setdefault(argument, []).append((op, type_, arguments))
    given = [types.get(o, "") for o in _names(operands)]
    written = sum(_sizes(result))
    moved = 0
    seen = set()
    for name, index in position.items():
        source = _names(operands)[index]
        if source in seen:
            continue
        seen.add(source)
        how = uses.get(name, [])
        if how and all(op in ("dynamic-slice", "slice") for op, _, _ in how):
            parts = sum(sum(_sizes(type_)) for _, type_, _ in how)
            moved += min(parts, sum(_sizes(given[index])))
        elif how and all(
            op == "dynamic-update-slice" and arguments[0] == name
            for op, _, arguments in how
        ):  # updated in place: only the part is written, and nothing is read
            whole = sum(_sizes(own[name]))
            part = sum(sum(_sizes(own.get(args[1], ""))) for _, _, args in how)
            written -= max(whole - part, 0)
        else:
            moved += sum(_sizes(given[index]))
    return moved + max(written, 0)


def _names(operands: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", operands)


def _split(rest: str) -> tuple[str, str]:
    """Operands and attributes of an instruction, from behind its first parenthesis."""
    depth = 1
    for end, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if not depth:
            return rest[:end], rest[end:]
    return rest, ""


def _sizes(type_: str, *, everywhere: bool = False) -> list[int]:
    """Bytes of each array; 0 where it lives in fast memory, unless `everywhere`."""
    sizes = []
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](\{[^}]*\})?", type_):
        if dtype in _ITEMSIZE:
            size = _ITEMSIZE[dtype]
            for dim in filter(None, dims.split(",")):
                size *= int(dim)
            fast = re.search(r"S\([1-9]", layout) and not everywhere
            sizes.append(0 if fast else size)
    return sizes


def computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation by its name; the entry computation is `ENTRY`."""
    found: dict[str, list[str]] = {}
    body: list[str] | None = None
    for line in hlo.splitlines():
        match = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
        if match:
            body = found.setdefault("ENTRY" if match.group(1) else match.group(2), [])
        elif line.startswith("}"):
            body = None
        elif body is not None:
            body.append(line)
    return found
