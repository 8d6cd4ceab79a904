"""What every benchmark prints and writes: the environment, tables, JSON."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Sequence
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "tokamax", "equinox", "libtpu")


def parser(doc: str, *, json: bool = True) -> argparse.ArgumentParser:
    """A parser whose help shows the module's docstring, with `--json` or without."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if json:
        made.add_argument("--json", metavar="FILE", help="also write the results here")
    return made


def positive(text: str) -> int:
    """The type of an option that counts something."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"it must be 1 or more; got {number}")
    return number


def environment(device: str | None = None) -> dict[str, Any]:
    """Device, versions and date; nothing that names this machine."""
    import jax_layernorm

    versions = {"python": platform.python_version()}
    versions["jax_layernorm"] = jax_layernorm.__version__
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": _host() if device is None else device,
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _host() -> str:
    import jax

    kind = jax.devices()[0].device_kind
    if jax.default_backend() != "cpu":
        return kind
    return f"{_cpu_model() or platform.machine()}, {os.cpu_count()} cores"


def _cpu_model() -> str | None:
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return None


def print_environment(where: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {v}" for name, v in where["versions"].items())
    print(f"{where['device']}; {versions}; {where['date']}\n", flush=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Columns as wide as their widest cell; all but the first are aligned right."""
    cells = [list(header), *([_cell(c) for c in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for i, row in enumerate(cells):
        first, *rest = zip(row, widths, strict=True)
        line = [first[0].ljust(first[1]), *(c.rjust(w) for c, w in rest)]
        print("  ".join(line).rstrip())
        if i == 0:
            print("  ".join("-" * w for w in widths))
    print(flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def write_json(
    path: str | None, where: dict[str, Any], results: list[dict[str, Any]], **more: Any
) -> None:
    if path is None:
        return
    with open(path, "w") as file:
        json.dump({**where, **more, "results": results}, file, indent=1)
        file.write("\n")
