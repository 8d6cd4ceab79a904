"""The files of one run, which may be killed between any two instructions.

- `config.json` comes first and `summary.txt` last. Without `config.json` there is
  nothing to resume; with `summary.txt` the run is finished.
- A step's row is in `metrics.csv` before its checkpoint is saved. On resume, rows after
  the checkpoint and an incomplete last line are cut, and these steps run again.
- Orbax makes a checkpoint appear whole or not at all; other files are written under
  another name and then moved into place.
"""

import csv
import json
import os
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import filelock
import jax
import orbax.checkpoint as ocp

CONFIG, METRICS, CHECKPOINTS = "config.json", "metrics.csv", "checkpoints"
LOCK = ".lock"
PLOT, SAMPLE, SUMMARY = "loss.png", "sample.txt", "summary.txt"
FILES = (CONFIG, METRICS, CHECKPOINTS, PLOT, SAMPLE, SUMMARY)


class UsageError(Exception):
    """Bad input: one line with the rule, what was received, and what to do."""


class Row(NamedTuple):
    """One line of `metrics.csv`; seconds are since the start."""

    step: int
    training_bits_per_byte: float
    validation_bits_per_byte: float | None
    tokens_per_second: int
    seconds: float

    @classmethod
    def parse(
        cls, step: str, training: str, validation: str, speed: str, seconds: str
    ) -> "Row":
        """A row from the cells of a line, which are in the order of the fields."""
        validated = float(validation) if validation else None
        return cls(int(step), float(training), validated, int(speed), float(seconds))


def check_folder(out: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Refuse an `out` that this run may not write to. Writes nothing.

    Raises:
      UsageError: `out` is no folder or cannot be written; it holds a run and `resume`
        is false; it holds a run of another configuration.
    """
    above = (out, *out.absolute().parents)
    parent = next(path for path in above if os.path.exists(path))
    if not parent.is_dir():
        raise UsageError(
            f"--out must be a folder; got {out}, but {parent} is a file. "
            "Give another --out."
        )
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"--out must be writable; got {out}, where {parent} is not. "
            "Give another --out."
        )
    found = [name for name in FILES if os.path.exists(out / name)]
    if not found:
        return
    if not resume:
        raise UsageError(
            f"--out must not hold a run already; {out} has {', '.join(found)}. "
            "Add --resume to continue that run, or give another --out."
        )
    if CHECKPOINTS in found and not (out / CHECKPOINTS).is_dir():
        raise UsageError(
            f"--resume needs a folder of checkpoints; {out / CHECKPOINTS} is a file. "
            "Give another --out."
        )
    if CONFIG not in found:
        raise UsageError(
            f"--resume needs the {CONFIG} of the run; "
            f"{out} has only {', '.join(found)}. Give another --out."
        )
    try:
        saved = json.loads((out / CONFIG).read_text("utf-8"))
        differences = [
            f"{name} is {saved.get(name)} there and {config.get(name)} here"
            for name in {**saved, **config}
            if saved.get(name) != config.get(name)
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"--resume needs a readable {CONFIG}; "
            f"{out / CONFIG}: {error}. Give another --out."
        ) from None
    if differences:
        raise UsageError(
            f"--resume needs the configuration of the run in {out}; "
            f"{'; '.join(differences)}. "
            "Repeat the settings of that run, or give another --out."
        )


def make_folder(out: Path) -> filelock.BaseFileLock:
    """Make `out` if it does not exist, and lock it against another run.

    The operating system holds the lock, and releases it if the process is killed.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(out / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise UsageError(
            f"--out must not be in use; another process is training in {out}. "
            "Wait for it, or give another --out."
        ) from None
    except OSError as error:
        raise UsageError(
            f"--out must be a folder that can be made; {out}: {error.strerror}. "
            "Give another --out."
        ) from None
    return lock


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file beside `path`, then move it there, so `path` is never half written."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(beside, path)


def open_checkpoints(out: Path) -> ocp.CheckpointManager:
    """Orbax's manager: keeps the last two checkpoints, removes unfinished ones."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager((out / CHECKPOINTS).absolute(), options=options)


def save_checkpoint(checkpoints: ocp.CheckpointManager, step: int, state: Any) -> None:
    """Save the state after `step` steps, unless it is saved already."""
    if checkpoints.latest_step() != step:
        checkpoints.save(step, args=ocp.args.StandardSave(state))


def restore_checkpoint(
    checkpoints: ocp.CheckpointManager, state: Any
) -> tuple[Any, int]:
    """The last saved state and its step; `state` itself and 0 if none is saved."""
    step = checkpoints.latest_step()
    if step is None:
        return state, 0
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    try:
        return checkpoints.restore(step, args=ocp.args.StandardRestore(target)), step
    except Exception as error:  # Orbax raises many kinds
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"--resume needs a readable checkpoint; step {step} in "
            f"{checkpoints.directory} is not: {reason}. Give another --out."
        ) from None


def append_row(metrics: TextIO, row: Row) -> None:
    """Write a line of `metrics.csv`, and flush it."""
    csv.writer(metrics, lineterminator="\n").writerow(row)
    metrics.flush()


def cut_metrics(out: Path, step: int) -> list[Row]:
    """Cut `metrics.csv` after `step`, and a torn last line; return the other rows."""
    path = out / METRICS
    try:
        text = path.read_text("utf-8") if path.exists() else ""
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines[1:] if line.endswith("\n")][:step]
        rows = [Row.parse(*cells) for cells in csv.reader(kept)]
    except (OSError, TypeError, ValueError) as error:
        raise UsageError(
            f"--resume needs the {METRICS} of the run; "
            f"{path}: {error}. Give another --out."
        ) from None
    if [row.step for row in rows] != list(range(1, step + 1)):
        raise UsageError(
            f"--resume needs the rows of steps 1 to {step} in {path}; "
            f"it has {len(rows)} of them. Give another --out."
        )
    write_file(path, "".join([",".join(Row._fields) + "\n", *kept]))
    return rows
