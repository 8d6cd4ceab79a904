"""Each benchmark has a help text, and measures a tiny problem; see also test_run.py."""

import importlib
import json
import os
import unittest.mock

import jax
import pytest

pytest.importorskip("benchmarks.support", reason="no benchmarks here")

COMMANDS = (
    "accuracy", "compile_only", "cpu", "cpu_without_kernel", "decoder_step", "overhead",
    "run", "tpu_kernels", "tpu_layers", "versions",
)  # fmt: skip


@pytest.fixture
def command():
    """Imports a command, and then undoes the environment variables that some set."""
    with unittest.mock.patch.dict(os.environ):
        yield lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(name).main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m benchmarks.{name} " in out
    assert "--norm" in out and "--json FILE" in out


@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    (
        ("cpu", ["--repetitions", "0"], "it must be 1 or more; got 0"),
        ("cpu", ["--plot", "x.png", "--norms", "flax"], "--plot draws joint over ours"),
        ("scaling", ["decoder", "--devices", "6"], "must be multiples of 4; got [6]"),
        ("run", ["--norms", "torch"], "nothing was measured"),
    ),
)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="run measures torch on GPUs")
def test_what_cannot_be_measured_is_refused(name, arguments, reason, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(name).main(arguments)
    assert reason in f"{stopped.value.code} {capsys.readouterr().err}"


def test_accuracy(command, tmp_path, capsys):
    path = tmp_path / "accuracy.json"
    command("accuracy").main(
        ["--dtypes", "float32", "--offsets", "0", "--shapes", "8x128", "--seeds", "1"]
        + ["--norms", "ours", "plain", "--json", str(path)]
    )
    assert "float32, ulps" in capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    assert [r["result"] for r in results] == ["y", "dx", "dscale", "dbias"]
    assert all(r[norm]["max"] < 4 for r in results for norm in ("ours", "plain"))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it measures CPUs")
def test_cpu(command, tmp_path, capsys):
    path = tmp_path / "cpu.json"
    command("cpu").main(
        ["--shapes", "8x128", "--dtypes", "float32", "--repetitions", "1"]
        + ["--programs", "inference", "joint"]
        + ["--norms", "ours", "plain", "floor", "--json", str(path)]
        + ["--threads", str(len(os.sched_getaffinity(0)))]
    )
    assert "ms (over ours)" in capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    norms = ("ours", "plain", "floor")
    expected = [(p, n) for p in ("inference", "joint") for n in norms]
    assert [(r["program"], r["norm"]) for r in results] == expected
    assert all(r["ms"] > 0 for r in results)
    with_errors = [(r["program"], r["norm"]) for r in results if "error of dx" in r]
    assert with_errors == [("joint", "ours"), ("joint", "plain")]


def test_overhead(command, tmp_path, capsys):
    path = tmp_path / "overhead.json"
    command("overhead").main(
        ["--count", "1", "--repetitions", "1", "--features", "8", "--json", str(path)]
    )
    assert "over flax" in capsys.readouterr().out
    results = json.loads(path.read_text())["results"]
    calls = {"flax", "ours", "ours linen"}
    expected = {(what, which) for what in ("lower", "eager") for which in calls}
    expected |= {("import", "jax"), ("import", "ours")}
    assert {(r["what"], r["which"]) for r in results} == expected
    assert all(r["ms"] > 0 for r in results)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it measures CPUs")
def test_cpu_without_kernel(command, tmp_path, capsys):
    path = tmp_path / "cpu.json"
    command("cpu_without_kernel").main(
        ["--cases", "last axis, 1000x1000", "--dtypes", "float32", "--programs"]
        + ["inference", "--repetitions", "1", "--json", str(path)]
    )
    assert "ms of xla, and the others' over that" in capsys.readouterr().out
    (result,) = json.loads(path.read_text())["results"]
    assert [*result["ms"]] == ["xla", "flax", "flax two-pass"]
    assert min(result["ms"].values()) > 0


def test_own_norms_names_the_models(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("own_norms").main(["--models", "GPT"])
    assert stopped.value.code == 2
    assert "choose from" in capsys.readouterr().err


def test_own_norms_says_what_to_install(command, monkeypatch, capsys):
    own_norms = command("own_norms")
    source = type(own_norms.SOURCES["LLaDA"])
    absent = source("no_such_package.models:Model", "pip install it", None)
    monkeypatch.setattr(own_norms, "SOURCES", {"Absent": absent})
    monkeypatch.setattr(own_norms, "apart", lambda measure, *a: measure(*a))
    with pytest.raises(SystemExit, match="pip install it"):
        own_norms.main(["--allow-xla"])
    out = capsys.readouterr().out
    assert "Absent left out: not installed: ModuleNotFoundError" in out
