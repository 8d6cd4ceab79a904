"""How long a training step of `examples/decoder` takes with each norm, on any device.

The step is the example's own: AdamW, 16 windows of 128 bytes. "none" is no norm at all;
the time that is left is not the norm's. The table gives medians over interleaved
repetitions in ms, and how many times as long as Flax's; lower is better.

    python -m benchmarks.decoder_step --widths 128
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples" / "decoder"))

import flax.linen
import model as decoder
import training

from benchmarks.support import peers, report, timing

NORMS = ("ours", "xla", "flax", "none")


class NoNorm(flax.linen.Module):
    """Its parameters are there, so that the optimizer does the same."""

    dtype: Any = None

    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1:]
        scale = self.param("scale", flax.linen.initializers.ones, features)
        bias = self.param("bias", flax.linen.initializers.zeros, features)
        return x + 0 * (scale + bias).astype(x.dtype)


def step_of(norm: str, width: int) -> Any:
    """A function that takes one step, and keeps the state."""
    config = decoder.DecoderConfig(width=width, norm=norm)
    settings = training.TrainingConfig()
    state = training.init_state(config, settings)
    step = training.make_train_step(config, settings)
    rng = np.random.default_rng(0)
    shape = (settings.batch, config.context + 1)
    windows = jnp.asarray(rng.integers(0, 256, shape), jnp.uint8)

    def run() -> None:
        nonlocal state
        state, loss = step(state, windows)
        jax.block_until_ready((state, loss))

    return run


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 256])
    peers.add_argument(parser, NORMS, (*peers.LINEN_NORMS, "none"))
    parser.add_argument("--repetitions", type=int, default=31)
    options = parser.parse_args(arguments)
    where = report.environment()
    report.print_environment(where)
    found = peers.available(options.norms)
    modules = {name: peer.linen for name, peer in found.items()} | {"none": NoNorm}
    decoder.NORMS |= modules
    norms = [name for name in options.norms if name in modules]
    results = []
    for width in options.widths:
        run = {norm: step_of(norm, width) for norm in norms}
        seconds = timing.interleaved(run, repetitions=options.repetitions)
        results += [
            {"width": width, "norm": norm, "ms": value * 1e3}
            | {"over flax": value / seconds["flax"] if "flax" in seconds else None}
            for norm, value in seconds.items()
        ]
    table = [[r["width"], r["norm"], r["ms"], r["over flax"]] for r in results]
    report.print_table(("width", "norm", "ms", "over flax"), table)
    report.write_json(options.json, where, results)


if __name__ == "__main__":
    main()
