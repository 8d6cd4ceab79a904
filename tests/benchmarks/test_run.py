"""The device benchmark: what it reads from a profile, and that it runs on a CPU too."""

import json

import jax
import pytest

run = pytest.importorskip("benchmarks.run", reason="no benchmarks here")


def profile(plane, lines):
    """Lines by name, each of `(start, duration)` in microseconds."""
    text = f'planes {{ name: "{plane}" event_metadata {{ key: 1 value {{ id: 1 }} }}'
    for name, events in lines.items():
        text += f' lines {{ name: "{name}"'
        for start, duration in events:
            text += (
                f" events {{ metadata_id: 1 offset_ps: {start * 10**6}"
                f" duration_ps: {duration * 10**6} }}"
            )
        text += " }"
    return jax.profiler.ProfileData.from_text_proto(text + " }")


def test_a_tpu_has_one_event_for_each_call():
    of_calls = [(0, 50), (100, 10), (200, 20)]
    lines = {"XLA Modules": of_calls, "XLA Ops": [(0, 1)] * 7}
    assert run.device_seconds(profile("/device:TPU:0", lines), 3) == 20e-6


def test_a_gpu_has_kernels_on_streams():
    """Each call has two, the second on another stream."""
    lines = {
        "Stream #1(Compute)": [(0, 5), (100, 6), (200, 70)],
        "Stream #2(MemcpyD2D)": [(10, 1), (110, 2), (280, 3)],
        "XLA Ops": [(0, 1)] * 7,
    }
    assert run.device_seconds(profile("/device:GPU:0", lines), 3) == 8e-6


def test_events_that_belong_to_no_call_are_an_error():
    lines = {"XLA Modules": [(0, 1)] * 4}
    with pytest.raises(ValueError, match=r"each of 3 calls .* got 4 events"):
        run.device_seconds(profile("/device:TPU:0", lines), 3)
    with pytest.raises(ValueError, match="got 0 events"):
        run.device_seconds(profile("/device:GPU:0", {}), 3)


def test_a_cpu_has_no_clock_of_its_own():
    assert run.device_seconds(profile("/host:CPU", {"thread": [(0, 1)]}), 1) is None


def test_it_runs_every_program_here(tmp_path, capsys):
    path = tmp_path / "run.json"
    small = ["--shapes", "8x128", "--dtypes", "float32", "--calls", "2"]
    norms = ["--norms", "ours", "pallas_tpu", "plain", "copy"]
    run.main([*small, *norms, "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    ran = [(r["program"], r["norm"]) for r in results]
    norms = ["ours", "pallas_tpu", "plain"]
    if jax.default_backend() != "tpu":
        norms.remove("pallas_tpu")
        assert "pallas_tpu left out: implementation=" in capsys.readouterr().out
    expected = [(p, n) for p in run.PROGRAMS for n in norms]
    expected.insert(len(norms), ("forward", "copy"))
    assert ran == expected
    assert all(r["wall ms"] > 0 for r in results)
    (joint,) = (r for r in results if (r["program"], r["norm"]) == ("joint", "ours"))
    assert joint["error of y"] < 4
    assert joint["floor arrays"] == 5


def test_it_runs_rms_norms_and_residual_sums(tmp_path):
    path = tmp_path / "run.json"
    small = ["--shapes", "8x128", "--dtypes", "float32", "--calls", "2", "--rms"]
    programs = ("backward", "joint", "block", *run.MORE_PROGRAMS)
    norms = ["--norms", "ours", "flax", "plain", "--programs", *programs]
    run.main([*small, *norms, "--json", str(path)])
    results = json.loads(path.read_text())["results"]
    ran = [(r["program"], r["norm"]) for r in results]
    assert ran == [(p, n) for p in programs for n in ("ours rms", "flax rms")]
    assert all(r["wall ms"] > 0 for r in results)
