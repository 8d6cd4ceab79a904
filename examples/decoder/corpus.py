"""The text: where it comes from, its windows, and how well compressors do on it.

A text is a `uint8` array whose bytes are the tokens. So nothing is learned or stored
for tokenization, and the losses of different texts can be compared in bits per byte.
"""

import bz2
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np

HELD_OUT_SHARE = 10  # the last tenth is held out
OVERLAP_RUN = 32  # bytes


def load_text(path: str | Path | None = None) -> np.ndarray:
    """The bytes of the file at `path`, or by default of Python's reference texts.

    Every CPython carries the language reference in `pydoc_data.topics` (what
    `help("while")` prints): about half a megabyte of English and code, a little
    different in every release.

    Raises:
      OSError: the file cannot be read.
    """
    if path is not None:
        return np.frombuffer(Path(path).read_bytes(), np.uint8)
    from pydoc_data.topics import topics

    return np.frombuffer(
        "\n\n".join(topics[name] for name in sorted(topics)).encode(), np.uint8
    )


def split_text(text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`(training, held_out)`: the last tenth (rounded down) is held out."""
    boundary = len(text) - len(text) // HELD_OUT_SHARE
    return text[:boundary], text[boundary:]


def training_batch(
    training: np.ndarray,
    rows: slice = slice(None),
    *,
    seed: int,
    step: int,
    batch: int,
    context: int,
) -> np.ndarray:
    """Windows `(batch, context + 1)` at places that depend on `seed` and `step` only.

    So a resumed run sees the same data as a run that was never interrupted, and no
    position has to be saved. Only the given `rows` are returned, so that a process
    reads no more than its part.
    """
    starts = np.random.default_rng([seed, step]).integers(
        0, len(training) - context, size=batch
    )
    return training[starts[rows, None] + np.arange(context + 1)]


def held_out_windows(
    training: np.ndarray, held_out: np.ndarray, *, context: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """Windows `(n, context + 1)` and how many of the last predictions `(n,)` count.

    Window i ends `(i + 1) * stride` bytes into the held-out text (the last one at its
    end) and counts the predictions that no earlier window counted. So every held-out
    byte is predicted once, from at least `context - stride + 1` and at most `context`
    bytes before it; the first ones look back into the training text.
    """
    text = np.concatenate([training[-context:], held_out])
    ends = np.minimum(np.arange(stride, len(held_out) + stride, stride), len(held_out))
    windows = text[(ends - 1)[:, None] + np.arange(context + 1)]
    return windows, np.diff(ends, prepend=0)


def overlap(
    training: np.ndarray, held_out: np.ndarray, run: int = OVERLAP_RUN
) -> float:
    """Share of held-out bytes in a run of `run` or more bytes that training has too."""

    def runs(text: np.ndarray) -> Iterator[bytes]:
        content = text.tobytes()
        return (content[at : at + run] for at in range(len(content) - run + 1))

    common = set(runs(held_out)).intersection(runs(training))
    covered = np.zeros(len(held_out), bool)
    for at, each in enumerate(runs(held_out)):
        if each in common:
            covered[at : at + run] = True
    return float(covered.mean())


def compressed_bits_per_byte(
    training: np.ndarray, held_out: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Bits per held-out byte by `bz2` and `xz`: `{name: (alone, primed)}`.

    Primed is size(training + held out) - size(training): what the held-out text adds to
    the archive.
    """
    first, rest = training.tobytes(), held_out.tobytes()
    result = {}
    for name, compress in (("bz2", bz2.compress), ("xz", lzma.compress)):
        primed = len(compress(first + rest)) - len(compress(first))
        result[name] = (8 * len(compress(rest)) / len(rest), 8 * primed / len(rest))
    return result
