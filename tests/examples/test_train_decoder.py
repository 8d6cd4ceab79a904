"""The example's program: killed, stopped, resumed, and given bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import train_decoder

EXAMPLES = Path(train_decoder.__file__).parent
SMALL_TEXT = Path(__file__).parents[1] / "support" / "data" / "small.txt"
SIZES = "--layers 1 --width 16 --heads 2 --context 16 --batch 2"
EVERY = "--validate-every 10 --checkpoint-every 10"
TINY = f"--text {SMALL_TEXT} {SIZES} --steps 40 {EVERY}".split()

# Moments to be killed at, each with what makes the process send itself SIGKILL there.
KILLED = {
    "before the first checkpoint": """
        def to_line(row, original=run_folder.Row.to_line):
            return die() if row.step == 5 else original(row)
        run_folder.Row.to_line = to_line""",
    "within a line of the metrics": """
        def to_line(row, original=run_folder.Row.to_line):
            line = die() if row.step == 15 else original(row)
            return line[:9] if row.step == 14 else line
        run_folder.Row.to_line = to_line""",
    "between the metrics and the checkpoint": """
        def save(checkpoints, step, state, original=run_folder.save_checkpoint):
            return die() if step == 20 else original(checkpoints, step, state)
        run_folder.save_checkpoint = save""",
    "while a checkpoint is saved": """
        def save(checkpoints, step, state, original=run_folder.save_checkpoint):
            if step == 20:
                threading.Timer(0.02, die).start()
            original(checkpoints, step, state)
            time.sleep(1 if step == 20 else 0)
        run_folder.save_checkpoint = save""",
    "after a checkpoint": """
        def save(checkpoints, step, state, original=run_folder.save_checkpoint):
            original(checkpoints, step, state)
            return die() if step == 30 else None
        run_folder.save_checkpoint = save""",
    "before the summary": """
        def plot(*_):
            die()
        train_decoder.report.plot_losses = plot""",
}
DRIVER = """
import os, signal, sys, threading, time
sys.path.insert(0, {examples!r})
import run_folder, train_decoder
def die():
    os.kill(os.getpid(), signal.SIGKILL)
{hook}
sys.exit(train_decoder.main(sys.argv[1:]))
"""


def start(arguments, hook=""):
    """The program in a process of its own."""
    hook = re.sub(r"^ {8}", "", hook, flags=re.MULTILINE)
    return subprocess.Popen(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            DRIVER.format(examples=str(EXAMPLES), hook=hook),
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


def finish(process):
    """Its output and errors, once it has ended."""
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def metrics(out):
    """The rows of `metrics.csv` without the times."""
    return [
        line.split(",")[:3] for line in (out / "metrics.csv").read_text().split("\n")
    ]


def files(folder):
    """Every path below `folder` with its content and time of change."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of an uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    code, output, errors = finish(start([*TINY, "--out", str(out)]))
    assert code == 0, errors
    return out, output


def test_a_killed_and_resumed_run_gives_the_metrics_of_an_uninterrupted_one(
    finished, tmp_path
):
    out = tmp_path / "run"
    for moment, hook in KILLED.items():
        code, _, errors = finish(start([*TINY, "--out", str(out), "--resume"], hook))
        assert code == -signal.SIGKILL, (moment, errors)
        assert not (out / "summary.txt").exists(), moment
    code, output, errors = finish(start([*TINY, "--out", str(out), "--resume"]))
    assert code == 0, errors
    assert "Resuming after step 40 of 40" in output
    assert metrics(out) == metrics(finished[0])
    assert (out / "sample.txt").read_bytes() == (
        finished[0] / "sample.txt"
    ).read_bytes()


def test_ctrl_c_saves_says_so_and_resumes_to_the_same_metrics(finished, tmp_path):
    out = tmp_path / "run"
    arguments = [*TINY, "--checkpoint-every", "1000", "--out", str(out)]
    slow_down = """
        def to_line(row, original=run_folder.Row.to_line):
            time.sleep(0.05)  # so that the signal comes before the end
            return original(row)
        run_folder.Row.to_line = to_line"""
    process = start(arguments, slow_down)
    while not (out / "metrics.csv").exists() or len(metrics(out)) < 5:
        assert process.poll() is None, finish(process)
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, output, errors = finish(process)
    assert code == 0
    assert "Traceback" not in errors
    step = int(re.search(r"Stopped by SIGINT: step (\d+) of 40 is saved", output)[1])
    assert 3 <= step < 40
    assert [path.name for path in (out / "checkpoints").iterdir()] == [str(step)]
    code, output, errors = finish(start([*arguments, "--resume"]))
    assert code == 0, errors
    assert f"Resuming after step {step} of 40" in output
    assert metrics(out) == metrics(finished[0])


def test_sigterm_saves_and_says_so(tmp_path, capsys, monkeypatch):
    def to_line(row, original=train_decoder.Row.to_line):
        if row.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return original(row)

    monkeypatch.setattr(train_decoder.Row, "to_line", to_line)
    assert train_decoder.main([*TINY, "--out", str(tmp_path)]) == 0
    assert "Stopped by SIGTERM: step 3 of 40 is saved" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "3").is_dir()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_run_leaves_readable_files_and_tells_them(finished):
    out, output = finished
    for name in (
        "config.json",
        "metrics.csv",
        "checkpoints",
        "loss.png",
        "sample.txt",
        "summary.txt",
    ):
        assert (out / name).exists()
        assert name in output
    assert sorted(path.name for path in out.iterdir()) == sorted(
        train_decoder.run_folder.FILES
    )
    assert json.loads((out / "config.json").read_text())["norm"] == "layernorm"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_bytes()) == 532
    rows = metrics(out)
    assert rows[0] == ["step", "training_bits_per_byte", "validation_bits_per_byte"]
    assert [row[0] for row in rows[1:-1]] == [str(step) for step in range(1, 41)]
    assert [row[0] for row in rows[1:-1] if row[2]] == ["10", "20", "30", "40"]
    assert output.endswith((out / "summary.txt").read_text())


def test_resume_of_a_finished_run_reprints_its_summary(finished, capsys):
    out, _ = finished
    before = files(out)
    assert train_decoder.main([*TINY, "--out", str(out), "--resume"]) == 0
    output, errors = capsys.readouterr()
    assert "finished already" in output
    assert output.endswith((out / "summary.txt").read_text())
    assert not errors
    assert files(out) == before


def test_resume_before_there_is_a_run_starts_one(tmp_path, capsys):
    arguments = [
        *TINY,
        "--steps",
        "3",
        "--norm",
        "rmsnorm",
        "--placement",
        "post",
        "--dtype",
        "bfloat16",
    ]
    assert (
        train_decoder.main([*arguments, "--out", str(tmp_path / "run"), "--resume"])
        == 0
    )
    assert "Nothing to resume yet" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(tmp_path, capsys):
    assert (
        train_decoder.main(
            [*TINY, "--learning-rate", "1e30", "--out", str(tmp_path / "run")]
        )
        == 1
    )
    assert "train_decoder: the loss must stay finite" in capsys.readouterr().err


def test_a_damaged_checkpoint_ends_with_2_and_keeps_the_metrics(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / "summary.txt").unlink()
    for path in (out / "checkpoints" / "40").rglob("*manifest*"):
        path.write_bytes(b"damaged")
    code, _, errors = finish(start([*TINY, "--out", str(out), "--resume"]))
    assert code == 2
    assert "train_decoder: --resume needs a readable checkpoint; step 40" in errors
    assert metrics(out) == metrics(finished[0])


BAD = {
    "no such text": (
        ["--text", "{tmp}/none.txt"],
        "--text must be a readable file; .*none.txt: No such file",
    ),
    "a folder as text": (
        ["--text", "{tmp}"],
        "--text must be a readable file; .*: Is a directory",
    ),
    "a text without permission": (
        ["--text", "{tmp}/secret.txt"],
        "--text must be a readable file; .*denied",
    ),
    "an empty text": (["--text", "{tmp}/empty.txt"], "the text has 0 bytes"),
    "a short text": (
        ["--text", "{tmp}/short.txt"],
        "the text has 159 bytes, its tenth 15, and --context is 16",
    ),
    "a context beyond the held-out text": (
        ["--context", "241"],
        "its tenth 240, and --context is 241",
    ),
    "a width that the heads do not divide": (
        ["--width", "10", "--heads", "4"],
        "multiple of heads; got width 10",
    ),
    "no layers": (["--layers", "0"], "layers must be at least 1; got 0"),
    "a negative width": (["--width", "-8"], "width must be at least 1; got -8"),
    "no heads": (["--heads", "0"], "heads must be at least 1; got 0"),
    "no context": (["--context", "0"], "context must be at least 1; got 0"),
    "no steps": (["--steps", "0"], "steps must be at least 1; got 0"),
    "no batch": (["--batch", "0"], "batch must be at least 1; got 0"),
    "a model beyond memory": (
        ["--width", "10000000"],
        "must fit into memory; they need about",
    ),
    "no learning rate": (
        ["--learning-rate", "0"],
        "learning_rate must be positive and finite; got 0.0",
    ),
    "a learning rate that is no number": (
        ["--learning-rate", "nan"],
        "positive and finite; got nan",
    ),
    "a negative weight decay": (
        ["--weight-decay", "-1"],
        "weight_decay must be finite and not negative; got -1.0",
    ),
    "a negative seed": (["--seed", "-1"], "seed must be from 0 to 4294967295; got -1"),
    "no validation": (
        ["--validate-every", "0"],
        "validate_every must be at least 1; got 0",
    ),
    "no checkpoints": (
        ["--checkpoint-every", "0"],
        "checkpoint_every must be at least 1; got 0",
    ),
    "steps that are no number": (
        ["--steps", "many"],
        "argument --steps: invalid int value: 'many'",
    ),
    "an unknown norm": (
        ["--norm", "batchnorm"],
        "argument --norm: invalid choice: 'batchnorm'",
    ),
    "an unknown option": (["--lr", "1"], "unrecognized arguments: --lr 1"),
    "a file as output": (
        ["--out", "{tmp}/short.txt"],
        "--out must be a folder; .*short.txt is a file",
    ),
    "an output below a file": (
        ["--out", "{tmp}/short.txt/run"],
        "--out must be a folder; .*short.txt is a file",
    ),
    "an output that cannot be made": (
        ["--out", "{tmp}/" + "x" * 300],
        "--out must be a folder that can be made; .*: File name too long",
    ),
    "an output without permission": (
        ["--out", "{tmp}/locked/run"],
        "--out must be writable",
    ),
    "an output with a run": (
        ["--out", "{finished}"],
        "--out must not hold a run already",
    ),
    "another run's output": (
        ["--out", "{finished}", "--resume", "--width", "32"],
        "width is 16 there and 32 here",
    ),
    "another text's output": (
        ["--out", "{finished}", "--resume", "--text", "{tmp}/long.txt"],
        "text_sha256 is",
    ),
    "files without a configuration": (
        ["--out", "{tmp}/odd", "--resume"],
        "--resume needs the config.json",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_line_and_changes_nothing(
    finished, tmp_path, capsys, arguments, message
):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_bytes(bytes(159))
    (tmp_path / "long.txt").write_bytes(bytes(2000))
    (tmp_path / "secret.txt").touch(mode=0o000)
    (tmp_path / "locked").mkdir(mode=0o500)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "metrics.csv").touch()
    if re.search("denied|writable", message) and os.geteuid() == 0:
        pytest.skip("root may read and write everything")
    before = files(tmp_path) | files(finished[0])
    given = [
        argument.format(tmp=tmp_path, finished=finished[0]) for argument in arguments
    ]
    assert train_decoder.main([*TINY, "--out", str(tmp_path / "run"), *given]) == 2
    errors = capsys.readouterr().err
    assert re.fullmatch(rf"train_decoder: [^\n]*{message}[^\n]*\n", errors)
    assert files(tmp_path) | files(finished[0]) == before


def test_the_program_exits_with_2_and_one_line(tmp_path):
    code, output, errors = finish(
        start(["--text", str(tmp_path / "none.txt"), "--out", str(tmp_path / "run")])
    )
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert not (tmp_path / "run").exists()
