"""The command line of `train.py`, with every check before the first write.

The options are the fields of `RunConfig`, `DevicesConfig`, `DecoderConfig` and
`TrainingConfig`; the text under a field is its help.
"""

import argparse
import hashlib
import os
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import corpus
import jax
import numpy as np
import simple_parsing
from mesh import Devices, Mesh, MeshShape, in_first, start_processes
from model import VOCABULARY, DecoderConfig
from run_folder import UsageError, check_folder
from training import TrainingConfig


def folder(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(
            f"must name a folder; got {text!r}. Give . for the current one"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(
            f"must be a name in UTF-8; got {text!r}. Give another one"
        ) from None
    return Path(text)


@dataclass(frozen=True)
class RunConfig:
    """Where the text comes from and where the files go."""

    text: Path | None = simple_parsing.field(  # noqa: RUF009  it makes a field
        default=None,
        type=Path,
        nargs=None,
        metavar="FILE",
        help="Train on this file. None: the reference texts that come with Python.",
    )
    out: Path = simple_parsing.field(  # noqa: RUF009
        default=Path("decoder-run"),
        type=folder,
        metavar="FOLDER",
        help="Folder for the files of the run.",
    )
    resume: bool = simple_parsing.field(default=False, action="store_true")
    """Go on from the last checkpoint in --out, if it has one."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        if self.checkpoint_every < 1:
            raise ValueError(
                f"checkpoint_every must be at least 1; got {self.checkpoint_every}. "
                "Try 100."
            )


@dataclass(frozen=True)
class DevicesConfig:
    """More than one device, and more than one process."""

    mesh: str | None = None
    """Devices along each axis, as in data=4,model=2. None: one device; with several
    processes, all their devices along data."""
    cpu_devices: int = 1
    """Let the CPU of this process act as this many devices."""
    coordinator: str | None = None
    """HOST:PORT of the first of several processes."""
    processes: int = 1
    """How many processes this run has. Start each with the same options, except
    --process-id."""
    process_id: int = 0
    """Which of the processes this is, from 0."""
    cluster: bool = simple_parsing.field(default=False, action="store_true")
    """Take the three options above from Slurm, Kubernetes or another cluster that JAX
    knows."""

    def __post_init__(self) -> None:
        if self.mesh is not None:
            MeshShape.parse(self.mesh)
        if self.cpu_devices < 1:
            raise ValueError(
                f"cpu_devices must be at least 1; got {self.cpu_devices}. Try 8."
            )
        if not 0 <= self.process_id < self.processes:
            raise ValueError(
                "process_id must be from 0 to processes - 1; got process_id"
                f" {self.process_id} and processes {self.processes}. Start each process"
                " with an id of its own."
            )
        if self.cluster and (self.processes > 1 or self.coordinator is not None):
            raise ValueError(
                "cluster takes coordinator and processes from the cluster; got"
                f" coordinator {self.coordinator} and processes {self.processes}. Leave"
                " them out, or leave out cluster."
            )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not (host and port.isdecimal() and 0 < int(port) < 2**16):
                raise ValueError(
                    f"coordinator must be HOST:PORT; got {self.coordinator!r}. Try"
                    " localhost:9876."
                )
        if (self.processes > 1) != (self.coordinator is not None):
            raise ValueError(
                "coordinator and processes go together; got coordinator"
                f" {self.coordinator} and processes {self.processes}. Give both, or"
                " neither for one process."
            )


class Run(NamedTuple):
    """A checked command line, with its text."""

    files: RunConfig
    devices: Devices
    config: DecoderConfig
    settings: TrainingConfig
    training: np.ndarray
    held_out: np.ndarray

    def describe(self) -> dict[str, Any]:
        """The settings and the text, as `config.json` holds them.

        A resumed run must have the same; its devices may be others.
        """
        text = np.concatenate([self.training, self.held_out])
        return {
            **asdict(self.config),
            **asdict(self.settings),
            "text_bytes": len(text),
            "text_sha256": hashlib.sha256(text.tobytes()).hexdigest(),
        }


class OneLineParser(simple_parsing.ArgumentParser):
    """A parser that does not print its usage before an error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; --help lists the options.")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The configurations, as `files`, `devices`, `config` and `settings`."""
    parser = OneLineParser(
        description="Train a small decoder-only transformer on bytes.",
        allow_abbrev=False,
        add_option_string_dash_variants=simple_parsing.DashVariant.DASH,
    )
    parser.add_arguments(RunConfig, "files")
    parser.add_arguments(DevicesConfig, "devices")
    parser.add_arguments(DecoderConfig, "config")
    parser.add_arguments(TrainingConfig, "settings")
    try:
        return parser.parse_args(arguments)
    except ValueError as error:  # a configuration refused its values
        raise UsageError(str(error)) from None


def read_options(arguments: list[str] | None) -> Run:
    """Parse, join the other processes, check, and load the text. Writes nothing.

    Raises:
      UsageError: the first thing that is wrong.
    """
    given = parse(arguments)
    devices = find_devices(given.devices)
    try:
        text = corpus.load_text(given.files.text)
    except OSError as error:
        raise UsageError(
            f"--text must be a readable file; {given.files.text}: {error.strerror}. "
            "Give another --text."
        ) from None
    training, held_out = corpus.split_text(text)
    run = Run(given.files, devices, given.config, given.settings, training, held_out)
    if len(held_out) < run.config.context:
        raise UsageError(
            "the held-out tenth of the text must be at least as long as --context; "
            f"the text has {len(text)} bytes, its tenth {len(held_out)}, and "
            f"--context is {run.config.context}. Give a longer --text or a smaller "
            "--context."
        )
    check_mesh(devices.shape, run.config, run.settings)
    check_memory(devices.shape, run.config, run.settings)
    check = partial(
        check_folder, run.files.out, run.describe(), resume=run.files.resume
    )
    in_first(check, UsageError, None)
    return run


def find_devices(given: DevicesConfig) -> Devices:
    """The devices of all processes, joined."""
    if given.cpu_devices > 1:
        jax.config.update("jax_num_cpu_devices", given.cpu_devices)
    try:
        start_processes(
            given.coordinator, given.processes, given.process_id, cluster=given.cluster
        )
    except (RuntimeError, ValueError) as error:
        fix = "Start all of them, with the same --coordinator and --processes."
        if given.cluster:
            fix = "Give --coordinator, --processes and --process-id without --cluster."
        reason = str(error).splitlines()[0].rstrip(".")
        raise UsageError(
            f"the processes did not find each other: {reason}. {fix}"
        ) from None
    there = jax.device_count()
    if given.mesh is not None:
        shape = MeshShape.parse(given.mesh)
    else:
        if jax.process_count() == 1:
            return Devices()
        shape = MeshShape(there, 1)
    wanted = shape.data * shape.model
    if wanted > there or (wanted < there and jax.process_count() > 1):
        raise UsageError(
            f"--mesh must fit the devices; data={shape.data},model={shape.model} needs"
            f" {wanted} and there are {there}. Give another --mesh or, on a CPU,"
            " --cpu-devices."
        )
    return Mesh.of(shape)


def check_mesh(
    shape: MeshShape, config: DecoderConfig, settings: TrainingConfig
) -> None:
    """Each array must split evenly along its axes of the mesh."""
    for axis, name, size in (
        ("data", "--batch", settings.batch),
        ("data", "--width", config.width),
        ("model", "--heads", config.heads),
        ("model", "the number of byte values", VOCABULARY),
    ):
        count = getattr(shape, axis)
        if size % count:
            raise UsageError(
                f"{name} must be a multiple of the devices along {axis}; it is {size},"
                f" and {axis}={count}. Give another --mesh or {name}."
            )


def check_memory(
    shape: MeshShape, config: DecoderConfig, settings: TrainingConfig
) -> None:
    """Refuse a model and batch that clearly cannot fit, by a rough lower bound."""
    layers, width, context = config.layers, config.width, config.context
    parameters = 12 * layers * width**2 + (VOCABULARY + context) * width
    saved = layers * (16 * width + 2 * config.heads * context) + 2 * VOCABULARY
    # Four float32 per parameter: itself, its gradient and the two moments of Adam.
    size = np.dtype(config.dtype).itemsize
    needed = 16 * parameters + size * settings.batch * context * saved
    device = jax.local_devices()[0]
    there = (device.memory_stats() or {}).get("bytes_limit")
    if there is not None:
        there *= shape.data * shape.model
    else:
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UsageError(
            "model and batch must fit into memory; they need about "
            f"{needed / 1e9:,.0f} GB and {device.device_kind} has {there / 1e9:,.0f} "
            "GB. Lower --batch, --context, --layers or --width."
        )
