"""`python -m jax_layernorm check`: its verdicts and what it prints, here on the CPU."""

import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from jax_layernorm import _check, _kernels
from jax_layernorm.__main__ import main

TINY = ["check", "--shapes", "24x128", "--dtypes", "float32"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(_check, "SECONDS", 0)


def implementations_in(printed):
    lines = (line.split() for line in printed.split("\n"))
    return {line[3] for line in lines if line[:2] == ["24x128", "float32"]}


def test_it_compares_and_times_every_implementation_that_runs_here(capsys):
    assert main(TINY) == 0
    printed = capsys.readouterr().out
    here = {
        name for name, kernel in _kernels.KERNELS.items() if "cpu" in kernel.platforms
    }
    left_out = {name for name in here if f"{name} was left out" in printed}
    assert implementations_in(printed) == (here - left_out) | {"Flax"}
    for norm in _check.NORMS:
        assert printed.count(f" {norm} ") == len(here - left_out) + 1
    assert f"jax {jax.__version__}" in printed
    assert "WRONG" not in printed
    assert printed.strip().split("\n")[-1].startswith("Use ")  # by times, which vary


@pytest.mark.usefixtures("marking_kernel")
def test_a_wrong_implementation_is_named_and_the_exit_code_is_1(monkeypatch, capsys):
    monkeypatch.setattr("marking_kernel.MarkingKernel.require_support", lambda *_: None)
    assert main(TINY) == 1
    printed = capsys.readouterr().out
    wrong = [line for line in printed.split("\n") if line.endswith("WRONG")]
    assert len(wrong) == len(_check.NORMS)
    assert all("marking" in line for line in wrong)
    assert "Wrong: marking, in 4 cases" in printed


@pytest.mark.usefixtures("marking_kernel")
def test_an_implementation_that_cannot_run_is_left_out_with_its_reason(capsys):
    assert main(TINY) == 0
    assert "marking was left out of some: " in capsys.readouterr().out


@pytest.mark.usefixtures("marking_kernel")
def test_one_that_fails_is_wrong_and_the_others_are_still_tried(monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("the compiler says no\nat length")

    monkeypatch.setattr("marking_kernel.MarkingKernel.forward", lambda *_: fails)
    assert main(["check", "--shapes", "24x16", "--dtypes", "float32"]) == 1
    printed = capsys.readouterr().out
    assert "it fails with RuntimeError: the compiler says no\n" in printed
    assert "Wrong: marking, the default, in 8 cases" in printed
    assert " xla " in printed and " Flax " in printed


def test_flax_may_fail(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flax.linen", None)  # importing it raises
    assert main(TINY) == 0
    assert "Flax was left out of some: it fails with" in capsys.readouterr().out


def test_a_reader_that_stops_reading_is_no_verdict():
    command = [sys.executable, "-m", "jax_layernorm"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 128 + signal.SIGPIPE and "Traceback" not in errors


@pytest.mark.parametrize("norm", _check.NORMS)
def test_nan_is_wrong(norm):
    problem = _check.draw(norm, (4, 8), "float32")
    out = jax.device_get(_check.program(_check.NORMS[norm])(*problem[1:]))
    right = _check.errors_of(out, problem)
    assert not right.too_large(rows=4)
    (y, normalized), dparams, dx = jax.tree.map(np.array, out)
    name = [*dparams][-1]
    for array in (y, dx, dparams[name]):
        kept, array[..., 0] = array[..., 0].copy(), np.nan
        assert _check.errors_of(((y, normalized), dparams, dx), problem).too_large(4)
        array[..., 0] = kept


@pytest.mark.parametrize(
    ("seconds", "says"),
    (
        (
            {"xla": 2.0, "native_cpu": 1.0},
            "native_cpu is right in all 1 cases, and 2.00",
        ),
        ({"xla": 1.0, "native_cpu": 2.0}, "native_cpu takes 2.00 times as long"),
        ({"xla": 1.0}, "XLA's implementation is the only one that runs here"),
    ),
)
def test_the_verdict_goes_by_the_time_beside_xla(seconds, says):
    errors = _check.Errors(0.0, 0.0, 0.0)
    rows = [
        _check.Row((8, 128), "float32", "layer_norm", name, False, errors, time, 1.0)
        for name, time in seconds.items()
    ]
    assert says in _check.verdict([rows])


def test_the_verdict_speaks_of_every_case():
    """Not only of layer norm, for which a kernel may be the default alone."""
    errors = _check.Errors(0.0, 0.0, 0.0)

    def verdict(*kernel_is_default):
        return _check.verdict(
            [
                [
                    _check.Row((8, 8), "float32", "", "cuda", is_it, errors, 1.0, 1.0),
                    _check.Row(
                        (8, 8), "float32", "", "xla", not is_it, errors, 2.0, 1.0
                    ),
                ]
                for is_it in kernel_is_default
            ]
        )

    assert verdict(True, True).startswith("Use the default: cuda")
    assert verdict(False, False).startswith("Use implementation='cuda': cuda")
    some = verdict(True, False)
    assert some.startswith(
        "Use implementation='cuda', the default in 1 of 2 cases: cuda"
    )


@pytest.mark.parametrize("off", (2.0**-16, -(2.0**-16)))
def test_an_error_of_either_sign_is_counted_in_ulps(off):
    right = np.array([[1.5, -1.0], [0.5, 3.0]])
    assert _check.ulps(np.float32(right + [[0.0, off], [0.0, 0.0]]), right) == 128
    wrong = np.float32(right + [[0.0, 0.0], [off, 0.0]])  # beside 3.0
    assert _check.ulps(wrong, right) == 64
    assert _check.ulps(wrong, right, np.full((2, 2), 8.0)) == 16


@pytest.mark.parametrize("rows", (5, 4096))
def test_no_row_is_left_unseen(monkeypatch, rows):
    monkeypatch.setattr(_check, "COMPARED", 64 * 16)
    problem = _check.draw("rms_norm", (rows, 16), "float32")
    (y, x), dparams, dx = jax.tree.map(
        np.array, _check.program(_check.NORMS["rms_norm"])(*problem[1:])
    )
    assert not _check.errors_of(((y, x), dparams, dx), problem).too_large(rows)
    y[3, 5] = np.nan
    assert _check.errors_of(((y, x), dparams, dx), problem).too_large(rows)


def test_a_call_is_timed_to_its_end(monkeypatch):
    """By a clock that only waiting for the result moves."""
    clock = [0.0]
    monkeypatch.setattr(_check.time, "perf_counter", lambda: clock[0])

    def wait(out):
        clock[0] += 3.0 * (len(out) if isinstance(out, list) else 1)

    monkeypatch.setattr(_check.jax, "block_until_ready", wait)
    assert _check.seconds_of(lambda: None) == 3.0


def test_a_few_features_are_judged_by_what_cancels(capsys):
    assert main(["check", "--shapes", "4096x4", "8x2", "--dtypes", "float32"]) == 0
    assert "WRONG" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    (["nothing"], ["check", "--shapes", "768"], ["check", "--shapes", "0x8"]),
)
def test_bad_arguments_end_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err
