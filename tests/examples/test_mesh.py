"""The decoder over a mesh, and in several processes: the losses of one device."""

import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import corpus
import jax
import numpy as np
import pytest
import quick
import train
from mesh import Devices, Mesh, MeshShape
from model import DecoderConfig
from options import read_options
from run_folder import UsageError
from training import TrainingConfig
from training import train as steps_of

ROOT = Path(__file__).parents[2]
SMALL_TEXT = ROOT / "tests" / "support" / "data" / "small.txt"
SIZES = "--layers 1 --width 16 --heads 2 --context 16 --batch 4 --steps 11"
TINY = f"--text {SMALL_TEXT} {SIZES} --validate-every 4 --checkpoint-every 3".split()
SHAPES = [(d, m) for d in (1, 2, 4, 8) for m in (1, 2, 4, 8) if d * m <= 8]
SOME = [(2, 1), (1, 2), (4, 2), (2, 4)]
"""Some of `SHAPES`; `ALL_MESHES=1 pytest tests/examples/test_mesh.py` takes all."""


@pytest.fixture(scope="module")
def losses():
    """`losses(shape)`: losses of 20 steps, on one device if `shape` is None."""
    config = DecoderConfig(layers=1, width=16, heads=8, context=8)
    text = corpus.split_text(corpus.load_text(SMALL_TEXT))

    def run(shape=None, *, validated=False):
        # The last step validates, which compiles one more program.
        settings = TrainingConfig(steps=20 if validated else 21, batch=8)
        devices = Devices() if shape is None else Mesh.of(MeshShape(*shape))
        with devices.entered():
            every = steps_of(config, settings, *text, devices=devices)
            steps = list(itertools.islice(every, 20))
        validation = [steps[-1].validation] if validated else []
        return [step.training for step in steps] + validation

    jax.config.update("jax_disable_most_optimizations", True)
    yield run
    jax.config.update("jax_disable_most_optimizations", False)


def test_a_mesh_gives_the_losses_of_one_device(losses):
    right = losses()
    for shape in SHAPES if "ALL_MESHES" in os.environ else SOME:
        np.testing.assert_allclose(losses(shape), right, atol=1e-4, err_msg=str(shape))


def test_a_mesh_gives_the_validation_of_one_device(losses):
    right, mesh = (losses(shape, validated=True) for shape in (None, (4, 2)))
    np.testing.assert_allclose(mesh, right, atol=1e-4)


def test_a_norm_adds_no_collective_to_a_step():
    pytest.importorskip("benchmarks.scaling", reason="there is no benchmarks/")
    from benchmarks import decoder_step, scaling

    scaling.decoder.NORMS["none"] = decoder_step.NoNorm
    try:
        config = DecoderConfig(layers=1, width=64, heads=4, context=16)
        of = {
            norm: scaling.of_step(
                DecoderConfig(**{**vars(config), "norm": norm}),
                TrainingConfig(batch=8), jax.devices()[:8], tpu=False,
            )
            for norm in ("layernorm", "flax", "none")
        }  # fmt: skip
    finally:
        del scaling.decoder.NORMS["none"]
    counts = {norm: len(found) for norm, found in of.items()}
    assert counts["layernorm"] == counts["flax"] == counts["none"]
    largest = {norm: sorted(c.bytes for c in found)[-5:] for norm, found in of.items()}
    assert largest["layernorm"] == largest["none"]
    x = 8 // 2 * 16 * 64 * 4  # bytes of the residual stream on a device
    more = sum(c.bytes for c in of["layernorm"]) - sum(c.bytes for c in of["none"])
    assert more <= 3 * 2 * 64 * 4 < x  # the gradients of three norms' parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ("--mesh data=0", "mesh must give the devices along data and model"),
        ("--mesh rows=2", "mesh must give the devices along data and model"),
        ("--mesh data=3", "--batch must be a multiple of the devices along data"),
        ("--mesh model=4", "--heads must be a multiple of the devices along model"),
        ("--mesh data=64", "--mesh must fit the devices"),
        ("--cpu-devices 0", "cpu_devices must be at least 1"),
        ("--processes 2", "coordinator and processes go together"),
        ("--processes 2 --process-id 2", "process_id must be from 0 to processes - 1"),
    ),
)
def test_a_mesh_that_cannot_be_is_refused(arguments, message, tmp_path):
    with pytest.raises(UsageError, match=re.escape(message)):
        read_options([*TINY, *arguments.split(), "--out", str(tmp_path / "run")])
    assert not list(tmp_path.iterdir())


# ---- several processes


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`start(count, *arguments)`: that many processes of one run of the example."""
    environment = quick.environment(tmp_path_factory.mktemp("compiled"))
    started = []

    def run(count, *arguments):
        coordinator = f"127.0.0.1:{free_port()}"
        common = ["--coordinator", coordinator, "--processes", str(count)]
        processes = [
            subprocess.Popen(
                [sys.executable, train.__file__, *TINY, *map(str, arguments)]
                + ([*common, "--process-id", str(i)] if count > 1 else []),
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                env=environment,
            )
            for i in range(count)
        ]  # fmt: skip
        started.extend(processes)
        return processes

    run.environment = environment
    yield run
    for process in started:
        process.kill()
        process.communicate()


def finish(processes):
    """Exit codes, outputs and errors, once all of them have ended."""
    both = [process.communicate(timeout=120) for process in processes]
    return [p.returncode for p in processes], *zip(*both, strict=True)


def rows(out):
    """Step and losses of each row of `metrics.csv`."""
    lines = (out / "metrics.csv").read_text().splitlines()[1:]
    return [[float(x) if x else 0.0 for x in line.split(",")[:3]] for line in lines]


@pytest.fixture(scope="module")
def right(start, tmp_path_factory):
    """The rows of a run on one device."""
    out = tmp_path_factory.mktemp("right") / "run"
    codes, _, errors = finish(start(1, "--out", out))
    assert codes == [0], errors
    return rows(out)


MESH = ("--mesh", "data=2,model=2", "--cpu-devices", "2")


def test_a_killed_process_ends_the_others_and_the_run_resumes(start, right, tmp_path):
    """And the checkpoint of two processes resumes in one, and in four."""
    out = tmp_path / "run"
    processes = start(2, *MESH, "--out", out)
    wanted = random.randint(4, 8)
    while not (out / "metrics.csv").exists() or len(rows(out)) < wanted:
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.01)
    processes[1].kill()
    began = time.monotonic()
    codes, _, errors = finish(processes)
    assert time.monotonic() - began < 60
    assert codes[0] not in (0, -signal.SIGKILL)
    assert "another process" in errors[0] or "another task" in errors[0], errors[0]
    assert not (out / "summary.txt").exists()

    for count, arguments in ((4, ["--mesh", "data=4"]), (1, [])):
        copy = tmp_path / f"in-{count}"
        subprocess.run(["cp", "-r", out, copy], check=True)
        codes, outputs, errors = finish(
            start(count, *arguments, "--resume", "--out", copy)
        )
        assert codes == [0] * count, errors
        assert re.search(r"Resuming after step [36] of 11", outputs[0])
        assert all("Device" not in output for output in outputs[1:])
        np.testing.assert_allclose(rows(copy), right, atol=1e-4)
        assert (copy / "summary.txt").exists()


SRUN = """#!{python}
import os, subprocess, sys
def start(i):
    of_task = {{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}
    return subprocess.Popen(sys.argv[1:], env=os.environ | of_task)
sys.exit(max(p.wait() for p in [start(i) for i in range(2)]))
"""


def test_the_launch_file_for_slurm(start, right, tmp_path):
    """With a `srun` that starts two tasks, as Slurm would on one node."""
    srun = tmp_path / "bin" / "srun"
    srun.parent.mkdir()
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o755)
    slurm = {"SLURM_JOB_ID": str(free_port()), "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_STEP_NODELIST": "127.0.0.1", "OUT": str(tmp_path / "run")}
    slurm |= {"PATH": f"{srun.parent}:{os.environ['PATH']}", "PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "examples/decoder/slurm.sh", *TINY, *MESH],
        cwd=ROOT, env=start.environment | slurm, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "in 2 process(es)" in done.stdout
    np.testing.assert_allclose(rows(tmp_path / "run"), right, atol=1e-4)


def test_a_second_run_in_the_same_folder_is_refused(start, tmp_path):
    out = tmp_path / "run"
    (first,) = start(1, "--out", out, "--steps", "100000", "--checkpoint-every", "1000")
    while not (out / "metrics.csv").exists():
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    arguments = ["--steps", "100000", "--checkpoint-every", "1000", "--resume"]
    codes, _, errors = finish(start(1, "--out", out, *arguments))
    first.kill()
    assert codes == [2]
    assert "--out must not be in use; another process is training in" in errors[0]
