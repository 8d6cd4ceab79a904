"""`make bench`, what it refuses to measure, and the fused residual in the decoder."""

import importlib
import json
import os
import subprocess
import unittest.mock

import jax
import numpy as np
import pytest

pytest.importorskip("benchmarks.support", reason="no benchmarks here")

from benchmarks import __main__ as entry
from benchmarks import decoder_step
from benchmarks.support import compilers, peers
from jax_layernorm._kernels import _library


def here(command, **_):
    """In place of `subprocess.run`: the part's `main` in this process."""
    module, *arguments = command[2:]
    with unittest.mock.patch.dict(os.environ):
        try:
            importlib.import_module(module).main(arguments)
        except SystemExit as stopped:
            print(stopped.code)
            return subprocess.CompletedProcess(command, 1)
    return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def no_library(monkeypatch):
    """As if the package were installed without a compiler, and without `--allow-xla`."""
    monkeypatch.setattr(_library, "not_loaded", lambda: "its library is elsewhere")
    monkeypatch.delenv(peers.ALLOW_XLA)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it measures CPUs")
def test_parts_and_summary(tmp_path, capfd):
    out = tmp_path / "new" / "folder"
    entry.main(["--tiny", "--out", str(out), "--parts", "cpu", "accuracy"])
    printed = capfd.readouterr().out
    summary = printed[printed.index("== Summary") :].splitlines()
    assert "lower is better" in summary[0]
    ours = peers.implementation("cpu")
    rows = [line.split() for line in summary if line.startswith(("cpu ", "accuracy "))]
    assert [row[1] for row in rows] == ["joint,", "y,", "dx,", "dscale,", "dbias,"]
    assert all(ours in row for row in rows)
    for name in ("cpu", "accuracy"):
        written = json.loads((out / f"{name}.json").read_text())
        assert written["ours"] == ours
        assert written.keys() >= {"device", "versions", "date", "results"}
    assert (out / "cpu.png").stat().st_size > 0


def test_a_part_that_cannot_run_is_left_out_with_the_reason(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(
        compilers, "unavailable", lambda platform: f"no {platform} here"
    )
    entry.main(["--out", str(tmp_path), "--parts", "compile_only_tpu"])
    assert "compile_only_tpu left out: no tpu here" in capsys.readouterr().out


@pytest.mark.parametrize("name", entry.PARTS)
@pytest.mark.parametrize("tiny", (False, True))
def test_arguments_are_those_of_the_command(name, tiny, tmp_path, monkeypatch):
    """They are parsed; then nothing runs."""
    with unittest.mock.patch.dict(os.environ):
        command = importlib.import_module(f"benchmarks.{entry.PARTS[name].command}")

    def parsed(*_):
        raise SystemExit("parsed")

    monkeypatch.setattr(compilers, "unavailable", lambda platform: None)
    monkeypatch.setattr("benchmarks.support.report.environment", parsed)
    with pytest.raises(SystemExit, match="parsed"):
        command.main(entry.arguments_of(name, tmp_path, tiny=tiny))


def test_summary_of_times_and_memory():
    rows = [(1, "ours", 2.0, 4.0), (1, "ours", 8.0, 4.0), (2, "flax", 3.0, 5.0)]
    keys = ("width", "norm", "ms", "temp MiB")
    results = [dict(zip(keys, row, strict=True)) for row in rows]
    made = {"results": results, "ours": "native_cpu", "device": "one"}
    table = entry.summary({"decoder_step": made})
    of_ours, of_flax = entry.NORMS.index("ours"), entry.NORMS.index("flax")
    assert [row[1:3] for row in table] == [
        ["1 width", "ms"], ["1 width", "temp MiB"],
        ["2 width", "ms"], ["2 width", "temp MiB"],
    ]  # fmt: skip
    none = [None, None]
    assert [row[3 + of_ours] for row in table] == ["4", "4", *none]
    assert [row[3 + of_flax] for row in table] == [*none, "3", "5"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is about CPUs")
def test_it_refuses_without_the_kernel(no_library, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "run", here)
    with pytest.raises(SystemExit) as stopped:
        entry.main(["--tiny", "--out", str(tmp_path), "--parts", "accuracy"])
    assert stopped.value.code == "accuracy failed with exit code 1; see above."
    said = capsys.readouterr().out.splitlines()[-1]
    assert "because its library is elsewhere; install the package" in said
    assert "--allow-xla" in said
    assert not list(tmp_path.iterdir())
    entry.main(["--tiny", "--out", str(tmp_path), "--parts", "accuracy", "--allow-xla"])
    assert json.loads((tmp_path / "accuracy.json").read_text())["ours"] == "xla"


@pytest.mark.parametrize("norms", (["ours"], ["flax", "ours fused"]))
def test_decoder_step_refuses_too(no_library, norms):
    if jax.default_backend() != "cpu":
        pytest.skip("it is about CPUs")
    with pytest.raises(SystemExit, match="ours would be xla on this CPU"):
        decoder_step.main(["--norms", *norms])


def test_other_norms_and_platforms_need_no_kernel(no_library):
    assert list(peers.available(["xla", "plain"], "cpu")) == ["xla", "plain"]
    assert list(peers.available(["ours"], "tpu")) == ["ours"]


@pytest.fixture(scope="module")
def steps():
    config = decoder_step.decoder.DecoderConfig(
        layers=2, width=16, heads=2, context=16, norm="flax"
    )
    settings = decoder_step.training.TrainingConfig(batch=4, steps=10)
    names = ("ours", decoder_step.FUSED)
    jax.config.update("jax_disable_most_optimizations", True)  # compiles faster
    yield {name: decoder_step.step_of(name, config, settings) for name in names}
    jax.config.update("jax_disable_most_optimizations", False)


def test_the_fused_decoder_has_the_same_parameters(steps):
    ours, fused = (step.params for step in steps.values())
    assert jax.tree.structure(ours) == jax.tree.structure(fused)
    assert jax.tree.leaves(ours) == jax.tree.leaves(fused)


def test_the_fused_decoder_has_the_same_losses(steps):
    ours, fused = ([step.run() for _ in range(6)] for step in steps.values())
    assert ours[-1] < ours[0] - 0.01  # it trains
    np.testing.assert_allclose(fused, ours, rtol=1e-5)


@pytest.mark.usefixtures("quick_compilation")
def test_decoder_step(tmp_path, capsys):
    path = tmp_path / "step.json"
    norms = ["ours fused", "none"]
    decoder_step.main(
        ["--widths", "16", "--layers", "1", "--repetitions", "1", "--json", str(path)]
        + ["--norms", *norms]
    )
    assert "temp MiB" in capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    assert [r["norm"] for r in results] == norms
    assert all(r["ms"] > 0 and r["temp MiB"] > 0 for r in results)
