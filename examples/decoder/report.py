"""What a run prints and plots at its end."""

import io
from collections.abc import Sequence

import corpus
import numpy as np
from options import Run
from run_folder import FILES, Row
from training import default_stride

COMPARED = 4 << 20
"""Bytes of each text that are compressed, at most."""


def summarize(
    run: Run, seconds: float, bits: float, prompt: bytes, drawn: bytes
) -> str:
    """Time, loss, figures to compare the loss with, the sample, and the files."""
    context, steps = run.config.context, run.settings.steps
    tokens = steps * run.settings.batch * context
    # The end of a long text, so that this takes seconds.
    read, asked = run.training[-COMPARED:], run.held_out[:COMPARED]
    whole = len(asked) == len(run.held_out) and len(read) == len(run.training)
    share = corpus.overlap(read, asked)
    text = (prompt + drawn).decode(errors="replace")
    compressed = [
        f"  {name:<4}{alone:.3f} alone, {primed:.3f} primed with the training text"
        for name, (alone, primed) in corpus.compressed_bits_per_byte(
            read, asked
        ).items()
    ]
    lines = [
        f"Training       {steps:,} steps in {seconds:.0f} s, "
        f"{tokens / seconds:,.0f} tokens/s; {tokens:,} tokens, "
        f"{tokens / len(run.training):.1f} times the training text",
        f"Held-out text  {bits:.4f} bits/byte",
        f"  All {len(run.held_out):,} bytes, each predicted once, from the "
        f"{context - default_stride(context) + 1} to {context} bytes before it.",
        "For scale, bits/byte of the same bytes compressed:",
        *compressed,
        *([] if whole else [f"  Of each text only {COMPARED:,} bytes are compared."]),
        "  The model has read the training text too, so the primed figures are the",
        "  ones to compare with. A compressor looks up repeated passages; the model",
        "  has only its parameters and its context.",
        f"  {share:.1%} of the held-out bytes lie in a run of {corpus.OVERLAP_RUN} or "
        "more bytes that the training text also has.",
        f"Sample, after the first {len(prompt)} held-out bytes:",
        *("  | " + line for line in text.splitlines()),
        f"Files in {run.files.out}: {', '.join(FILES)}",
    ]
    return "\n".join(lines) + "\n"


def plot_losses(rows: Sequence[Row], final: float, title: str) -> bytes:
    """Training and validation loss over the steps, in bits per byte, as a PNG."""
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    steps = np.array([row.step for row in rows])
    losses = np.array([row.training_bits_per_byte for row in rows])
    validated = [
        (row.step, row.validation_bits_per_byte)
        for row in rows
        if row.validation_bits_per_byte is not None
    ]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#4c78a8", alpha=0.25, linewidth=0.8)
    axes.plot(
        steps,
        _running_mean(losses),
        color="#4c78a8",
        linewidth=1.8,
        label="training (running mean)",
    )
    axes.plot(
        *zip(*validated, strict=True),
        color="#e45756",
        marker="o",
        markersize=3.5,
        label="validation (part of the held-out text)",
    )
    axes.axhline(
        final,
        color="#333333",
        linestyle=":",
        linewidth=1.2,
        label=f"whole held-out text: {final:.3f}",
    )
    low = min(losses.min(), final, *(value for _, value in validated))
    axes.set(xlabel="training step", ylabel="loss (bits per byte)", title=title)
    axes.set_xlim(0, steps[-1])
    axes.set_ylim(max(0.0, low - 0.25), min(8.2, max(low + 3.0, final + 0.5)))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def _running_mean(values: np.ndarray) -> np.ndarray:
    """The mean of each step and the last 2% of the steps before it."""
    window = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
