"""The device plan of the CUDA kernels runs, here by emulation."""

import json
import pathlib

import cuda_emulation
import jax
import pytest

pytest.importorskip("benchmarks.support", reason="no benchmarks here")

from benchmarks import cuda_device, run
from benchmarks.support import peers, torch_gpu

pytestmark = pytest.mark.skipif(
    cuda_emulation.missing() is not None, reason=str(cuda_emulation.missing())
)


@pytest.fixture
def lines(monkeypatch, tmp_path):
    """`lines(*arguments)`: the exit code, and what is written."""
    jax.clear_caches()
    cuda_emulation.install(monkeypatch)
    monkeypatch.setattr(cuda_device, "SMOKE", ("9x48",))
    table = {"norms": ["cuda", "copy"], "shapes": ["6x64"], "programs": ["forward"]}
    monkeypatch.setattr(cuda_device, "TABLES", {"main": table})
    path = tmp_path / "lines.jsonl"

    def run(*arguments):
        small = ["--shapes", "6x64", "--dtypes", "bfloat16", "--calls", "1"]
        code = cuda_device.main([*arguments, *small, "--json", str(path)])
        return code, [json.loads(line) for line in path.read_text().splitlines()]

    yield run
    jax.clear_caches()


def test_values_and_tiles(lines, monkeypatch):
    tiles = {"forward": [(8, 512, 2)], "backward": [(8, 512, 2)]}
    monkeypatch.setattr(cuda_device, "TILES", tiles)
    stages = ("smoke", "values", "times", "sweep")
    code, (environment, gpu, smoke, *values) = lines(*stages)
    *values, times, first, last, forward = values
    assert code == 0 and "device" in environment and gpu["gpu"]["capability"] == 90
    assert smoke["shape"] == "9x48" and len(values) == 8
    assert sum("round_before_scale" in line for line in values) == 4
    assert all(line["right"] and line["same bits"] for line in (smoke, *values))
    swept = [(line["program"], line["fetch first"]) for line in (first, last, forward)]
    assert swept == [("backward", True), ("backward", False), ("forward", False)]
    assert all(line["wall ms"] > 0 for line in (first, last, forward))
    results = json.loads(pathlib.Path(times["written"]).read_text())["results"]
    assert {row["norm"] for row in results} == {"cuda", "copy"}


def test_skew(lines, monkeypatch):
    monkeypatch.setattr(cuda_device, "SKEWED", ("3x48",))
    code, (_, *skewed) = lines("skew")
    assert code == 0 and len(skewed) == 2 * len(cuda_device.SKEWS)
    assert all(line["same bits"] for line in skewed)


def test_every_table_is_a_command():
    for table in cuda_device.TABLES.values():
        words = [w for key, given in table.items() for w in (f"--{key}", *given)]
        options = run.parser().parse_args(words)
        norms = {*options.norms} - {*torch_gpu.NORMS, "copy"}
        assert norms <= {*(peers.RMS_NORMS if options.rms else peers.NORMS)}


def test_it_stops_in_time(lines):
    code, (*_, last) = lines("values", "--seconds", "-1")
    assert code == 0 and last["stopped"] == "no time is left"


def test_a_wrong_value_is_a_failure(lines, monkeypatch):
    right = cuda_emulation.run_once

    def wrong(launch, *arguments):
        first, *rest = right(launch, *arguments)
        return [(first * 1.02).astype(first.dtype), *rest]

    monkeypatch.setattr(cuda_emulation, "run_once", wrong)
    code, (*_, smoke) = lines("smoke")
    assert code == 1 and not smoke["right"]


def test_smoke_in_another_process(lines, monkeypatch):
    """The other process has no emulation, so it fails, and the failure is reported."""
    code, (*_, graph) = lines("graph")
    assert code == 1 and graph["returncode"] != 0


def test_torchs_norms():
    pytest.importorskip("torch", reason="torch is not installed")
    rows = torch_gpu.measure("torch", [(8, 128)], ["float32"], 2, device="cpu")
    assert [row["program"] for row in rows] == list(torch_gpu.PROGRAMS)
    assert all(row["device ms"] is None and row["GB/s"] > 0 for row in rows)
