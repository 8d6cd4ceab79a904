"""Runs of the decoder example, each in a separate process that starts quickly.

`python train_server.py` imports the example once, and forks a process for each request.
JAX has started no backend and no thread by then, so a forked process is as good as a new
one: it can be stopped by any signal, at any moment.

A request is a line of JSON: the command line, one of `MOMENTS` or "", and the file for
what the run prints. The answer is its process id at once, and its exit code at the end.
"""

import json
import os
import re
import signal
import sys
import time

import matplotlib.axes  # the program imports both late
import matplotlib.backends.backend_agg  # noqa: F401
import run_folder
import train


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_first_checkpoint():
    def append_row(metrics, row, original=run_folder.append_row):
        original(metrics, row)
        if row.step == 2:
            die()

    run_folder.append_row = append_row


def within_a_line_of_the_metrics():
    def append_row(metrics, row, original=run_folder.append_row):
        if row.step == 5:
            metrics.write("5,7.9")
            metrics.flush()
            die()
        original(metrics, row)

    run_folder.append_row = append_row


def between_the_metrics_and_the_checkpoint():
    def save(checkpoints, step, state, original=run_folder.save_checkpoint):
        if step == 6:
            die()
        original(checkpoints, step, state)

    run_folder.save_checkpoint = save


def while_a_checkpoint_is_saved():
    """Its arrays are on the disk, but the files that describe them are not."""

    def audit(event, arguments):
        if event == "open" and re.search(r"/6\..*tmp/_METADATA", str(arguments[0])):
            die()

    sys.addaudithook(audit)


def after_a_checkpoint():
    def save(checkpoints, step, state, original=run_folder.save_checkpoint):
        original(checkpoints, step, state)
        if step == 9:
            die()

    run_folder.save_checkpoint = save


def before_the_summary():
    train.report.plot_losses = lambda *_: die()


def stopped_by_sigterm():
    def append_row(metrics, row, original=run_folder.append_row):
        original(metrics, row)
        if row.step == 2:
            signal.raise_signal(signal.SIGTERM)

    run_folder.append_row = append_row


def slowed_down():
    """Slows each step, so that a signal comes before the end."""

    def append_row(metrics, row, original=run_folder.append_row):
        original(metrics, row)
        time.sleep(0.2)

    run_folder.append_row = append_row


KILLED = (
    before_the_first_checkpoint,
    within_a_line_of_the_metrics,
    between_the_metrics_and_the_checkpoint,
    while_a_checkpoint_is_saved,
    after_a_checkpoint,
    before_the_summary,
)
MOMENTS = {each.__name__: each for each in (*KILLED, stopped_by_sigterm, slowed_down)}


def serve() -> None:
    for line in sys.stdin:
        arguments, moment, printed = json.loads(line)
        child = os.fork()
        if not child:
            break
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        return
    for number, suffix in ((1, "out"), (2, "err")):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(f"{printed}.{suffix}", flags), number)
    if moment:
        MOMENTS[moment]()
    sys.exit(train.main(arguments))


if __name__ == "__main__":
    serve()
