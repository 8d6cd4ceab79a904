"""The example's program: killed, stopped, resumed, and given bad input."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import quick
import run_folder
import train
import train_server
from model import DecoderConfig
from options import RunConfig, read_options
from training import TrainingConfig

SMALL_TEXT = Path(__file__).parents[1] / "support" / "data" / "small.txt"
SIZES = "--layers 1 --width 16 --heads 2 --context 16 --batch 2"
EVERY = "--validate-every 4 --checkpoint-every 3"
TINY = f"--text {SMALL_TEXT} {SIZES} --steps 11 {EVERY}".split()


class Program:
    """A run of the program in a separate process, which `train_server` starts."""

    def __init__(self, server, printed, arguments, moment=None):
        self.server, self.printed = server, printed
        request = (list(map(str, arguments)), moment and moment.__name__, str(printed))
        server.stdin.write(json.dumps(request) + "\n")
        self.process_id = int(server.stdout.readline())

    def finish(self):
        """Its exit code, output and errors, once it has ended."""
        code = int(self.server.stdout.readline())
        texts = [
            self.printed.with_suffix(each).read_text() for each in (".out", ".err")
        ]
        return code, *texts


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that starts the program; later runs load what earlier ones compiled."""
    folder = tmp_path_factory.mktemp("runs")
    with subprocess.Popen(
        [sys.executable, "-W", "error", train_server.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        env=quick.environment(folder / "compiled"),
    ) as server:
        yield lambda *given: Program(server, folder / "printed", *given)
        server.stdin.close()


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
def finished(start, tmp_path_factory):
    """The folder of an uninterrupted run, and what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    code, output, errors = start([*TINY, "--out", out]).finish()
    assert code == 0, errors
    return out, output


def test_a_killed_and_resumed_run_gives_the_metrics_of_an_uninterrupted_one(
    start, finished, tmp_path
):
    out = tmp_path / "run"
    outputs = []
    for moment in train_server.KILLED:
        arguments = [*TINY, "--out", out, "--resume"]
        code, output, errors = start(arguments, moment).finish()
        assert code == -signal.SIGKILL, (moment.__name__, errors)
        assert not (out / "summary.txt").exists(), moment.__name__
        outputs.append(output)
    code, output, errors = start([*TINY, "--out", out, "--resume"]).finish()
    assert code == 0, errors
    assert "Nothing to resume yet: starting from the beginning" in outputs[0]
    resumed = re.findall(
        r"Resuming after step (\d+) of 11", "".join([*outputs, output])
    )
    assert resumed == ["3", "3", "3", "9", "11"]
    assert metrics(out) == metrics(finished[0])
    assert (out / "sample.txt").read_bytes() == (
        finished[0] / "sample.txt"
    ).read_bytes()
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"9", "11"}


def test_ctrl_c_saves_says_so_and_resumes_to_the_same_metrics(
    start, finished, tmp_path
):
    out = tmp_path / "run"
    arguments = [*TINY, "--checkpoint-every", "1000", "--out", out]
    program = start(arguments, train_server.slowed_down)
    while not (out / "metrics.csv").exists() or len(metrics(out)) < 4:
        os.kill(program.process_id, 0)  # it is running
        time.sleep(0.01)
    os.kill(program.process_id, signal.SIGINT)
    code, output, errors = program.finish()
    assert code == 0
    assert "Traceback" not in errors
    step = int(re.search(r"Stopped by SIGINT: step (\d+) of 11 is saved", output)[1])
    assert 2 <= step < 11
    assert [path.name for path in (out / "checkpoints").iterdir()] == [str(step)]
    code, output, errors = start([*arguments, "--resume"]).finish()
    assert code == 0, errors
    assert f"Resuming after step {step} of 11" in output
    assert metrics(out) == metrics(finished[0])


def test_sigterm_saves_and_says_so(start, tmp_path):
    arguments = [*TINY, "--out", tmp_path]
    code, output, _ = start(arguments, train_server.stopped_by_sigterm).finish()
    assert code == 0
    assert "Stopped by SIGTERM: step 2 of 11 is saved" in output
    assert (tmp_path / "checkpoints" / "2").is_dir()


def test_a_second_signal_acts_as_usual():
    # A shell starts what it runs in the background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with train.stop_requests() as received:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert received == [signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_run_leaves_readable_files_and_lists_them(finished):
    out, output = finished
    assert {path.name for path in out.iterdir()} == {*run_folder.FILES, run_folder.LOCK}
    assert all(name in output for name in run_folder.FILES)
    assert json.loads((out / "config.json").read_text())["norm"] == "layernorm"
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_bytes()) == 532
    rows = metrics(out)
    assert rows[0] == ["step", "training_bits_per_byte", "validation_bits_per_byte"]
    assert [row[0] for row in rows[1:-1]] == [str(step) for step in range(1, 12)]
    assert [row[0] for row in rows[1:-1] if row[2]] == ["4", "8", "11"]
    assert output.endswith((out / "summary.txt").read_text())


def test_resume_of_a_finished_run_reprints_its_summary(finished, capsys):
    out, _ = finished
    before = files(out)
    assert train.main([*TINY, "--out", str(out), "--resume"]) == 0
    output, errors = capsys.readouterr()
    assert "finished already" in output
    assert output.endswith((out / "summary.txt").read_text())
    assert not errors
    assert files(out) == before


def test_every_option_reaches_the_run(tmp_path):
    kinds = {
        RunConfig: RunConfig(SMALL_TEXT, tmp_path / "run", True, 7),
        DecoderConfig: DecoderConfig(1, 12, 3, 8, "rmsnorm", "post", "bfloat16"),
        TrainingConfig: TrainingConfig(4, 5, 0.5, 0.25, 6, 7),
    }
    arguments = []
    for kind, wanted in kinds.items():
        for each in dataclasses.fields(kind):
            value = getattr(wanted, each.name)
            assert value != each.default, each.name
            arguments.append("--" + each.name.replace("_", "-"))
            arguments += [] if value is True else [str(value)]
    run = read_options(arguments)
    assert [run.files, run.config, run.settings] == list(kinds.values())


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(start, tmp_path):
    arguments = [*TINY, "--learning-rate", "1e30", "--weight-decay", "0"]
    arguments += ["--out", tmp_path / "run"]
    code, _, errors = start(arguments).finish()
    assert code == 1
    assert "train: the loss must stay finite; it is nan at step" in errors
    assert "Traceback" not in errors


def test_a_last_loss_that_is_not_finite_is_noticed_too(tmp_path, capsys):
    """The training loss of the only step is that of the initial parameters."""
    arguments = [*TINY, "--learning-rate", "1e30", "--weight-decay", "0"]
    arguments += ["--steps", "1", "--out", str(tmp_path / "run")]
    assert train.main(arguments) == 1
    assert "the loss must stay finite; it is nan at step 1" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.txt").exists()


def test_a_file_that_cannot_be_written_ends_with_one_line(
    tmp_path, capsys, monkeypatch
):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "save_checkpoint", full)
    assert train.main([*TINY, "--out", str(tmp_path / "run")]) == 1
    errors = capsys.readouterr().err
    assert "train: a file cannot be read or written: [Errno 28] No space" in errors


def test_a_damaged_checkpoint_ends_with_2_and_keeps_the_metrics(
    start, finished, tmp_path
):
    out = shutil.copytree(finished[0], tmp_path / "run")
    (out / "summary.txt").unlink()
    for path in (out / "checkpoints" / "11").rglob("*manifest*"):
        path.write_bytes(b"damaged")
    code, _, errors = start([*TINY, "--out", out, "--resume"]).finish()
    assert code == 2
    assert "train: --resume needs a readable checkpoint; step 11" in errors
    assert metrics(out) == metrics(finished[0])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\n2,", "\nx,", "needs the metrics.csv of the run; .*invalid literal"),
        ("\n2,", "\n2,9,", "needs the metrics.csv of the run; .*"),
        ("\n2,", "\n7,", "needs the rows of steps 1 to 11 in .*; it has 11"),
        ("\n2,", "\n2,\udcff", "needs the metrics.csv of the run; .*can't decode"),
    ],
    ids=["a letter", "a column too many", "another step", "no text"],
)
def test_damaged_metrics_are_refused_and_kept(finished, tmp_path, old, new, message):
    path = tmp_path / "metrics.csv"
    text = (finished[0] / "metrics.csv").read_text().replace(old, new)
    path.write_bytes(text.encode(errors="surrogateescape"))
    before = files(tmp_path)
    with pytest.raises(run_folder.UsageError, match=message):
        run_folder.cut_metrics(tmp_path, 11)
    assert files(tmp_path) == before


BAD = {
    "no such text": (
        ["--text", "{tmp}/none.txt"],
        "--text must be a readable file; .*none.txt: No such file",
    ),
    "a folder as text": (
        ["--text", "{tmp}"],
        "--text must be a readable file; .*: Is a directory",
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
    "too many steps": (["--steps", "9" * 11], "steps must be below 2147483648; got 9"),
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
    "decay beyond zero": (
        ["--weight-decay", "1e30"],
        "got 0.003 .* Lower one of them.",
    ),
    "out without a name": (["--out", ""], "argument --out: must name a folder; got ''"),
    "out that is no text": (["--out", "\udcff"], "--out: must be a name in UTF-8; got"),
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
    "a mesh with an axis twice": (
        ["--mesh", "data=1,data=2"],
        "mesh must give the devices along data and model, each once; got 'data=1,data=2'",
    ),
    "a coordinator without a port": (
        ["--processes", "2", "--coordinator", "nohost"],
        "coordinator must be HOST:PORT; got 'nohost'",
    ),
    "a cluster and a coordinator": (
        ["--cluster", "--processes", "2", "--coordinator", "localhost:9876"],
        "cluster takes coordinator and processes from the cluster",
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
    "a file instead of checkpoints": (
        ["--out", "{tmp}/file", "--resume"],
        "--resume needs a folder of checkpoints; .*checkpoints is a file",
    ),
    "files without a configuration": (
        ["--out", "{tmp}/odd", "--resume"],
        "--resume needs the config.json",
    ),
}


@contextlib.contextmanager
def another_user():
    """A user who is not root, because root may read and write everything."""
    if os.geteuid():
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_gives_one_line_and_changes_nothing(
    finished, tmp_path, capsys, arguments, message
):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_bytes(bytes(159))
    (tmp_path / "long.txt").write_bytes(bytes(2000))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "metrics.csv").touch()
    (tmp_path / "file").mkdir()
    for name in ("config.json", "checkpoints"):
        (tmp_path / "file" / name).touch()
    before = files(tmp_path) | files(finished[0])
    given = [
        argument.format(tmp=tmp_path, finished=finished[0]) for argument in arguments
    ]
    assert train.main([*TINY, "--out", str(tmp_path / "run"), *given]) == 2
    assert_one_line(capsys, message)
    assert files(tmp_path) | files(finished[0]) == before


def assert_one_line(capsys, message):
    errors = capsys.readouterr().err
    assert re.fullmatch(rf"train: [^\n]*{message}[^\n]*\n", errors)


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--text", "secret.txt", "--text must be a readable file; .*denied"),
        ("--out", "locked/run", "--out must be writable"),
    ],
)
def test_what_the_user_may_not_touch_is_refused(capsys, option, name, message):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        os.chmod(folder, 0o755)
        folder = Path(folder)
        (folder / "small.txt").write_bytes(SMALL_TEXT.read_bytes())
        (folder / "secret.txt").touch(mode=0o000)
        (folder / "locked").mkdir(mode=0o500)
        given = [
            *TINY,
            "--text",
            str(folder / "small.txt"),
            "--out",
            str(folder / "run"),
        ]
        # Run once as the first user, so that the other user imports nothing.
        assert train.main([*given, "--out", str(folder / "small.txt")]) == 2
        assert_one_line(capsys, "small.txt is a file")
        before = files(folder)
        with another_user():
            code = train.main([*given, option, str(folder / name)])
        assert code == 2
        assert_one_line(capsys, message)
        assert files(folder) == before


def test_the_program_exits_with_2_and_one_line(tmp_path):
    text, out = tmp_path / "none.txt", tmp_path / "run"
    ended = subprocess.run(
        [sys.executable, "-W", "error", train.__file__, "--text", text, "--out", out],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert not out.exists()


def test_help_has_every_option_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for kind in (RunConfig, DecoderConfig, TrainingConfig):
        for each in dataclasses.fields(kind):
            option = "--" + each.name.replace("_", "-")
            assert re.search(
                rf"{option} [^-].*?\(default: {each.default}\)", printed
            ), option
