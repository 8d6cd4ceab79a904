"""Train a small decoder-only transformer on bytes, and compare normalizations.

    python examples/decoder/train.py --out my-run

It trains on the reference texts that come with Python, unless --text names a file, and
takes about four minutes on two CPU cores. README.md says what the other files hold.

You can stop a run at any moment, even with `kill -9`. The same command with `--resume`
continues from the last checkpoint. Its metrics, except times, are bit for bit those of
a run that was never stopped.

With --mesh it trains on several devices, and with --processes in several processes.
Only the first process prints and writes. README.md has examples.

Exit codes: 0 finished, or stopped by Ctrl-C or SIGTERM with a checkpoint saved; 1 the
loss is no longer finite, a file cannot be written, or another process is gone; 2 bad
input, nothing written; 130 stopped by a second Ctrl-C, or before there was anything to
save.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext, redirect_stdout
from functools import partial
from types import FrameType

import jax
import mesh
import report
import run_folder
from model import Params, generate, init_params
from options import Run, read_options
from run_folder import Row, UsageError
from tqdm import tqdm
from training import Step, evaluate, init_state, train

PROMPT_BYTES, SAMPLE_BYTES = 32, 500


def main(arguments: list[str] | None = None) -> int:
    """The whole program; returns the exit code."""
    try:
        run = read_options(arguments)
        with redirect_stdout(sys.stdout if mesh.is_first() else None):
            return start(run)
    except (UsageError, FloatingPointError) as error:
        if mesh.is_first():
            print(f"train: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        print(
            f"train: {str(error).splitlines()[0]} If this is because another process"
            " of the run is gone, start all of them again with --resume: they go on from"
            " the last save.",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        mesh.end_without_the_others()
    except OSError as error:
        print(
            f"train: a file cannot be read or written: {error}. Mend that, and the same"
            " command with --resume goes on from the last save.",
            file=sys.stderr,
        )  # fmt: skip
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command with --resume goes on from the last save.")
        return 130


def start(run: Run) -> int:
    """Print what is about to happen, and do it unless the run is finished."""
    config, settings, out = run.config, run.settings, run.files.out
    device = jax.local_devices()[0]
    shapes = jax.tree.leaves(jax.eval_shape(partial(init_params, config), 0))
    parameters = sum(math.prod(each.shape) for each in shapes)
    print(
        f"Device  {device.platform} ({device.device_kind}), {os.cpu_count()} CPU cores"
    )
    if run.devices.shape != (1, 1):
        data, model = run.devices.shape
        print(
            f"Mesh    {data} devices along data times {model} along model, in"
            f" {jax.process_count()} process(es)"
        )
    print(f"Model   {config.title()}, {parameters:,} parameters")
    print(
        f"Text    {run.files.text or 'pydoc_data.topics'}: "
        f"{len(run.training):,} bytes to train on, {len(run.held_out):,} held out"
    )
    print(
        f"Steps   {settings.steps:,} of {settings.batch * config.context:,} tokens "
        f"({settings.batch} windows of {config.context} bytes)"
    )
    print(f"Output  {out}", flush=True)
    finished = run.files.resume and (out / run_folder.SUMMARY).exists()
    if mesh.any_process(mesh.is_first() and finished):
        print("This run is finished already. Its summary:\n")
        print((out / run_folder.SUMMARY).read_text("utf-8"), end="")
        return 0
    if run.files.resume and not (out / run_folder.CONFIG).exists():
        print("Nothing to resume yet: starting from the beginning.", flush=True)
    lock = mesh.in_first(
        partial(run_folder.make_folder, out), UsageError, nullcontext()
    )
    with lock:
        if mesh.is_first():
            description = json.dumps(run.describe(), indent=2) + "\n"
            run_folder.write_file(out / run_folder.CONFIG, description)
        return train_in_folder(run)


def train_in_folder(run: Run) -> int:
    """Train from the last checkpoint, if there is one, and report at the end."""
    config, settings, out = run.config, run.settings, run.files.out
    with (
        run.devices.entered(),
        run_folder.open_checkpoints(out) as checkpoints,
        stop_requests() as stop,
    ):
        state = init_state(config, settings, run.devices)
        state, done = run_folder.restore_checkpoint(checkpoints, state)
        rows = mesh.in_first(partial(run_folder.cut_metrics, out, done), UsageError, [])
        if done:
            print(f"Resuming after step {done} of {settings.steps}.", flush=True)
        steps = train(
            config, settings, run.training, run.held_out,
            state=state, done=done, devices=run.devices,
        )  # fmt: skip
        stopping = False
        with closing(record(steps, run, rows)) as recorded:
            for result in recorded:
                state, done = result.state, result.step
                due = done % run.files.checkpoint_every == 0 or done == settings.steps
                stopping = mesh.any_process(bool(stop))
                if due or stopping:
                    run_folder.save_checkpoint(checkpoints, done, state)
                if stopping:
                    break
    if stopping:
        name = signal.Signals(stop[0]).name if stop else "a signal to another process"
        print(f"Stopped by {name}: step {done} of {settings.steps} is saved in {out}.")
        print("The same command with --resume goes on from there.")
        return 0
    finish(run, state.params, rows)
    return 0


def record(
    steps: Iterator[Step], run: Run, rows: list[Row]
) -> Generator[Step, None, None]:
    """Pass each step on once it is in `rows` and in the metrics, and show progress."""
    first, before = (rows[-1].step, rows[-1].seconds) if rows else (0, 0.0)
    validations = [
        row.validation_bits_per_byte
        for row in rows
        if row.validation_bits_per_byte is not None
    ]
    tokens = run.settings.batch * run.config.context
    beginning = time.perf_counter()
    path = run.files.out / run_folder.METRICS if mesh.is_first() else os.devnull
    with (
        open(path, "a") as metrics,
        tqdm(
            initial=first,
            total=run.settings.steps,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10,
            disable=not mesh.is_first(),
        ) as bar,
    ):
        for result in steps:
            for loss in (result.training, result.validation):
                if loss is not None and not math.isfinite(loss):
                    bar.close()
                    raise FloatingPointError(
                        f"the loss must stay finite; it is {loss} at step "
                        f"{result.step}. Give a --learning-rate below "
                        f"{run.settings.learning_rate} and another --out."
                    )
            seconds = time.perf_counter() - beginning
            speed = round((result.step - first) * tokens / seconds)
            losses = (result.training, result.validation)
            total = round(before + seconds, 3)
            rows.append(Row(result.step, *losses, speed, total))
            run_folder.append_row(metrics, rows[-1])
            if result.validation is not None:
                validations.append(result.validation)
            validation = f"{validations[-1]:.3f}" if validations else "-"
            bar.set_postfix_str(
                f"loss {result.training:.3f}, validation {validation} bits/byte, "
                f"{speed:,.0f} tokens/s",
                refresh=False,
            )
            bar.update()
            yield result


def finish(run: Run, params: Params, rows: list[Row]) -> None:
    """Evaluate, draw a sample, plot; write and print the summary."""
    print("Evaluating on the whole held-out text ...", flush=True)
    with run.devices.entered():
        bits = evaluate(
            run.config, params, run.training, run.held_out, devices=run.devices
        )
        params = run.devices.gathered(params)
    if not mesh.is_first():
        return
    prompt = run.held_out[:PROMPT_BYTES].tobytes()
    drawn = generate(run.config, params, prompt, SAMPLE_BYTES, seed=run.settings.seed)
    plot = report.plot_losses(rows, bits, run.config.title())
    run_folder.write_file(run.files.out / run_folder.PLOT, plot)
    run_folder.write_file(run.files.out / run_folder.SAMPLE, prompt + drawn)
    print("Compressing the text, to compare ...", flush=True)
    summary = report.summarize(run, rows[-1].seconds, bits, prompt, drawn)
    run_folder.write_file(run.files.out / run_folder.SUMMARY, summary)
    print(summary, end="")


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM is collected; the second one acts as usual."""
    received: list[int] = []
    usual = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)
    }

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each, handler in usual.items():
            signal.signal(each, handler)

    for number in usual:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    # The sample is any text, and the terminal may not have its characters.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main())
