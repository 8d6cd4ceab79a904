"""Models of other packages with norm classes of their own, computed by `replace(also=)`.

FlaxLlama, FlaxGemma and FlaxT5 are from Hugging Face's transformers, Gemma3 is from
google-deepmind/gemma, LLaDA is from jax-ml/bonsai. The weights are small and random. For
each model the command prints

- how many norms are replaced, how many are left, and why
- "norm": how far the function in `also` is from the class's `__call__`, for random input
- "logits", "gradients": the largest difference in float32 over the largest magnitude of
  the array, for the worst array; lower is better
- "equal": the share of elements that have the same bits if weights and activations are
  bfloat16; higher is better. FlaxT5's norm returns float32 even then. Gemma3's norm
  takes its statistics in bfloat16, and ours in float32. By default XLA leaves out
  roundings between operations that it fuses, and it fuses the two models differently.
  "Rounded" means that it keeps every rounding. Even then two norms may differ in the last
  bit of float32, which rarely changes a rounding to bfloat16, but then changes everything
  that depends on that element.
- "error": the root mean square of bfloat16 logits minus the logits of the original model
  in float32 with the same weights, over that of the latter; lower is better
- the time of a training step with AdamW, the median over interleaved repetitions, and the
  ratio of ours to theirs; lower is better
- "calls": how many calls of this package's kernels the compiled step has

If a package cannot be imported, the command prints the reason. To install them:

    python -m pip install . flax "transformers<5" gemma
    git clone https://github.com/jax-ml/bonsai && export PYTHONPATH=$PWD/bonsai

Version 5 of transformers has no Flax models. gemma needs Python 3.12; pip takes minutes to
resolve it, and uv takes seconds. PyPI's bonsai is another package. This ran with jax
0.10.2, flax 0.12.8, transformers 4.57.6, gemma 4.0.1, and bonsai at 3628425.

    python -m benchmarks.own_norms --models FlaxLlama LLaDA
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from benchmarks.support import peers, report, timing
from benchmarks.support.own_norm_models import SOURCES, Logits, Model, Size

DTYPES = ("float32", "bfloat16")
LARGEST_NORM_DIFFERENCE = 1e-5
"""In float32. A larger one means that a function in `also` is wrong."""
NORM_ROWS = 1024


class Programs(NamedTuple):
    """What is compiled from a model, as it is or with our norms."""

    gradients: Any
    """Returns the gradients, and the logits too."""
    step: Any
    rounded: Any
    """Returns the logits; XLA leaves no rounding out."""


OPTIMIZER = optax.adamw(1e-4)


def compiled(logits: Logits, params: Any, tokens: jax.Array) -> Programs:
    def loss(params: Any, tokens: jax.Array) -> Any:
        found = logits(params, tokens)
        losses = optax.softmax_cross_entropy_with_integer_labels(
            found[:, :-1].astype(jnp.float32), tokens[:, 1:]
        )
        return losses.mean(), found

    gradients = jax.grad(loss, has_aux=True)

    def step(params: Any, state: Any, tokens: jax.Array) -> Any:
        updates, state = OPTIMIZER.update(gradients(params, tokens)[0], state, params)
        return optax.apply_updates(params, updates), state

    state = OPTIMIZER.init(params)
    return Programs(
        jax.jit(gradients).lower(params, tokens).compile(),
        jax.jit(step).lower(params, state, tokens).compile(),
        jax.jit(logits)
        .lower(params, tokens)
        .compile({"xla_allow_excess_precision": False}),
    )


def training(step: Any, params: Any, tokens: jax.Array) -> Callable[[], object]:
    """Takes one step, and keeps the state."""
    state = (params, OPTIMIZER.init(params))

    def run() -> object:
        nonlocal state
        state = jax.block_until_ready(step(*state, tokens))
        return state

    return run


def cast(params: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda a: a.astype(dtype), params)


def with_random_vectors(params: Any, key: jax.Array) -> Any:
    """Changes the norms' gains, which are all equal at first; that could hide mistakes."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        a + 0.1 * jax.random.normal(k, a.shape, a.dtype) if a.ndim == 1 else a
        for k, a in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference in an array over its largest magnitude; the worst array."""

    def of_array(ours: Any, theirs: Any) -> float:
        a, b = (np.asarray(array, np.float64) for array in (ours, theirs))
        return float(np.abs(a - b).max() / (np.abs(b).max() or 1))

    return max(jax.tree.leaves(jax.tree.map(of_array, ours, theirs)))


def share_equal(ours: jax.Array, theirs: jax.Array) -> float:
    return float(np.mean(np.asarray(ours) == np.asarray(theirs)))


def error(found: jax.Array, reference: jax.Array) -> float:
    a, b = (np.asarray(array, np.float64) for array in (found, reference))
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


def norms(model: Model, dtype: Any, size: Size) -> tuple[jax.Array, jax.Array]:
    """A norm of random input, by ours and by the class itself, not jitted."""
    norm, compute = model.norm, model.compute
    x = 3 * jax.random.normal(jax.random.key(1), (NORM_ROWS, size.width), dtype)
    if isinstance(norm, nnx.Module):
        params = with_random_vectors(nnx.state(norm), jax.random.key(2))
        nnx.update(norm, cast(params, dtype))
        return compute(norm, x), norm(x)
    made = norm.init(jax.random.key(0), x)
    variables = cast(with_random_vectors(made, jax.random.key(2)), dtype)
    return nn.apply(compute, norm)(variables, x), norm.apply(variables, x)


def measure(name: str, size: Size, options: Any) -> dict[str, Any]:
    """A result for `--json`, or "missing" with the reason if the import fails."""
    try:
        kind = pkgutil.resolve_name(SOURCES[name].name)
    except Exception as failure:  # a package too old for this jax fails in any way
        reason = f"{type(failure).__name__}: {failure}".splitlines()[0]
        return {"missing": f"not installed: {reason}; {SOURCES[name].install}"}
    package = SOURCES[name].name.partition(".")[0]
    result: dict[str, Any] = {"model": name, "note": SOURCES[name].note}
    result["package"] = f"{package} {sys.modules[package].__version__}"
    shape = (options.batch, size.length)
    tokens = jax.random.randint(jax.random.key(3), shape, 1, size.vocab)
    in_float32: Any = None  # the original model, which takes other weights too
    for dtype in DTYPES:
        model = SOURCES[name].load(kind, jnp.dtype(dtype).type, size)
        result["norm"] = (
            f"{type(model.norm).__module__}.{type(model.norm).__qualname__}"
        )
        params = cast(with_random_vectors(model.params, jax.random.key(2)), dtype)
        theirs = compiled(model.logits, params, tokens)
        also = {type(model.norm): model.compute}
        with model.replaced(also) as (logits, found):
            ours = compiled(logits, params, tokens)
        result["replaced"], result["left"] = found.replaced, found.left
        our_norm, their_norm = norms(model, dtype, size)
        if our_norm.dtype != their_norm.dtype:
            sys.exit(
                f"{name}: the function in `also` must return what the class does,"
                f" {their_norm.dtype}; got {our_norm.dtype}. Correct its dtype=."
            )
        our_gradients, our_logits = ours.gradients(params, tokens)
        their_gradients, their_logits = theirs.gradients(params, tokens)
        if their_logits.dtype != dtype:
            sys.exit(f"{name}: logits must be {dtype}; got {their_logits.dtype}")
        if dtype == "float32":
            result["norm difference"] = difference(our_norm, their_norm)
            if not result["norm difference"] < LARGEST_NORM_DIFFERENCE:
                sys.exit(
                    f"{name}: the function in `also` must compute the class's norm; in"
                    f" float32 it differs by {result['norm difference']:.3g}. Correct it."
                )
            result["logits difference"] = difference(our_logits, their_logits)
            result["gradients difference"] = difference(our_gradients, their_gradients)
            in_float32 = theirs.gradients
        else:
            rounded = (p.rounded(params, tokens) for p in (ours, theirs))
            result["norm equal"] = share_equal(our_norm, their_norm)
            result["logits equal rounded"] = share_equal(*rounded)
            result["logits equal"] = share_equal(our_logits, their_logits)
            _, reference = in_float32(cast(params, jnp.float32), tokens)
            result["error of theirs"] = error(their_logits, reference)
            result["error of ours"] = error(our_logits, reference)
        seconds = timing.interleaved(
            {
                "theirs": training(theirs.step, params, tokens),
                "ours": training(ours.step, params, tokens),
            },
            repetitions=options.repetitions,
        )
        result |= {f"{dtype} {n} ms": 1e3 * s for n, s in seconds.items()}
        result[f"{dtype} over theirs"] = seconds["ours"] / seconds["theirs"]
        target = 'custom_call_target="jax_layernorm_'
        result[f"{dtype} calls"] = ours.step.as_text().count(target)
    return result


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls it in a separate process, because gemma changes a method of Flax's modules."""
    processes = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, processes) as executor:
        return executor.submit(function, *arguments).result()


COLUMNS = {
    "model": "model", "norm difference": "norm, float32",
    "logits difference": "logits, float32", "gradients difference": "gradients, float32",
    "norm equal": "norm, equal", "logits equal rounded": "logits, equal (rounded)",
    "logits equal": "logits, equal (default)",
    "error of theirs": "error, theirs", "error of ours": "error, ours",
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--models", nargs="+", default=[*SOURCES], choices=[*SOURCES])
    parser.add_argument("--width", type=report.positive, default=256)
    parser.add_argument("--layers", type=report.positive, default=4)
    parser.add_argument("--batch", type=report.positive, default=8)
    parser.add_argument(
        "--length", type=report.positive, default=128, help="tokens in an example"
    )
    parser.add_argument("--repetitions", type=report.positive, default=21)
    peers.add_allow_xla(parser)
    options = parser.parse_args(arguments)
    where = report.environment()
    where["versions"]["optax"] = optax.__version__
    report.print_environment(where)
    implementation = peers.implementation()
    size = Size(options.width, options.layers, options.length)
    results, missing = [], {}
    for name in options.models:
        result = apart(measure, name, size, options)
        if "missing" in result:
            missing[name] = result["missing"]
            print(f"{name} left out: {result['missing']}", flush=True)
            continue
        results.append(result)
        counts = f"{len(result['replaced'])} replaced, {len(result['left'])} left"
        print(f"{name} of {result['package']}: {counts}")
        for path, reason in result["left"].items():
            print(f"  left {path}: {reason}")
        if result["note"] is not None:
            print(f"  note: {result['note']}")
        sys.stdout.flush()
    if not results:
        commands = dict.fromkeys(SOURCES[name].install for name in missing)
        sys.exit("no model can be imported; install one:\n" + "\n".join(commands))
    print("\nReplaced against original; --help explains the columns")
    report.print_table(COLUMNS.values(), [[r[c] for c in COLUMNS] for r in results])
    print(
        f"A training step of {size.layers} layers of width {size.width},"
        f" {options.batch}x{size.length} tokens, ms; lower is better"
    )
    columns = ("theirs ms", "ours ms", "over theirs", "calls")
    report.print_table(
        ("model", "dtype", *columns),
        [
            [r["model"], dtype, *(r[f"{dtype} {column}"] for column in columns)]
            for r in results
            for dtype in DTYPES
        ],
    )
    report.write_json(
        options.json, where, results, ours=implementation, missing=missing,
        batch=options.batch, **size._asdict(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
