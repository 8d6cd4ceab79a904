"""Do the tests bite? Makes small slips in the core, one at a time, and runs the tests.

    make mutants                    # a random sample of 150 places
    make mutants ARGS='--sample 20 --seed 1 --files _sharding.py'

It draws a place in the code at random, then one of the slips that can be made there:
cosmic-ray's operators (`+` for `-`, `<=` for `<`, `not`, numbers, True for False, `and`
for `or`, a decorator or a loop's body left out), and a call replaced by its first
argument. Annotations and overloads get no slips, because they are not executed. Each
slip runs in a copy of the tree with the tests that concern its file (`TESTS`), the
quickest first, until a test fails. Survivors are printed as differences. The exit code is
1 if less than 90 % are killed.
"""

from __future__ import annotations

import argparse
import ast
import collections
import concurrent.futures
import contextlib
import dataclasses
import difflib
import json
import multiprocessing
import os
import pathlib
import queue
import random
import shutil
import sys
import tempfile
import time

import cosmic_ray.ast
import cosmic_ray.mutating
import cosmic_ray.plugins
import parso
from cosmic_ray.operators.operator import Operator

ROOT = pathlib.Path(__file__).parents[1]
CORE = "core/test_properties core/test_guards core/test_functions"
MIXED = "transforms/test_sharding_mixed"
SHARDED = f"{MIXED} transforms/test_sharding"
TESTS = {  # for each file; the tests that are quickest and catch most come first
    "_equations.py": f"{CORE} core/test_round_before_scale core/test_saved "
    f"core/test_edges {SHARDED}",
    "_normalize.py": f"{CORE} core/test_saved {MIXED} transforms/test_kernel_op "
    "transforms/test_transforms",
    "_batching.py": "transforms/test_kernel_op transforms/test_transforms",
    "_sharding.py": f"{SHARDED} transforms/test_kernel_op",
    "_pruning.py": "core/test_saved",
    "_kernel_op.py": f"transforms/test_kernel_op {MIXED} transforms/test_transforms",
    "_kernels/__init__.py": "core/test_explain transforms/test_kernel_op "
    "core/test_explain_placements",
    "_kernels/xla.py": f"core/test_guards kernels/test_xla {CORE}",
    "_arguments.py": "core/test_arguments core/test_guards core/test_functions",
    "_own_norms.py": "flax/test_replace_own flax/test_replace_nnx "
    "flax/test_replace_linen_left",
    "_linen_replace.py": "flax/test_replace_linen_left flax/test_replace_own "
    "flax/test_replace_linen",
    "_nnx_replace.py": "flax/test_replace_nnx flax/test_replace_own",
    "_flax.py": "flax/test_nnx flax/test_replace_linen_left flax/test_flax_claims "
    "flax/test_linen flax/test_modules flax/test_replace_nnx flax/test_replace_linen",
    "_functions.py": "core/test_functions core/test_arguments core/test_guards "
    "core/test_round_before_scale core/test_explain core/test_saved",
    "_explain.py": "core/test_explain core/test_explain_placements",
    "_check.py": "core/test_check",
    "_linen_norms.py": "flax/test_linen flax/test_modules flax/test_flax_claims",
    "_nnx_norms.py": "flax/test_nnx flax/test_modules flax/test_flax_claims",
    "_safetensors.py": "flax/test_convert",
    "convert.py": "flax/test_convert",
    "_kernels/_rows.py": f"kernels/test_rows kernels/test_native_cpu {MIXED}",
    "_kernels/native_cpu/__init__.py": "kernels/test_native_cpu "
    "kernels/test_native_cpu_calls kernels/test_rows core/test_functions",
    "_kernels/cuda/__init__.py": "kernels/test_cuda core/test_explain",
    "_kernels/cuda/_tiles.py": "kernels/test_cuda",
    "_kernels/cuda/_compile.py": "kernels/test_cuda",
    "_kernels/pallas_tpu/__init__.py": "kernels/test_pallas_tpu core/test_explain",
}
OPERATORS = (
    *(f"core/ReplaceBinaryOperator_{a}_{b}" for a, b in (
        ("Add", "Sub"), ("Sub", "Add"), ("Mul", "Div"), ("Div", "Mul"), ("Pow", "Mul"),
        ("BitOr", "BitAnd"), ("BitAnd", "BitOr"), ("FloorDiv", "Mul"), ("Mod", "Mul"),
    )),
    *(f"core/ReplaceComparisonOperator_{a}_{b}" for a, b in (
        ("Eq", "NotEq"), ("NotEq", "Eq"), ("Is", "IsNot"), ("IsNot", "Is"),
        ("Lt", "LtE"), ("LtE", "Lt"), ("Gt", "GtE"), ("GtE", "Gt"),
    )),
    "core/ReplaceUnaryOperator_Delete_USub", "core/ReplaceUnaryOperator_Delete_Not",
    "core/AddNot", "core/ReplaceTrueWithFalse", "core/ReplaceFalseWithTrue",
    "core/ReplaceAndWithOr", "core/ReplaceOrWithAnd", "core/NumberReplacer",
    "core/RemoveDecorator", "core/ZeroIterationForLoop",
)  # fmt: skip
SECONDS = 900  # a mutant that runs longer is killed: it hangs
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ["jax", "flax.nnx", "flax.linen"]


class CallToFirstArgument(Operator):
    """`f(x, y)` becomes `x`: a cast, a guard or a broadcast left out."""

    def mutation_positions(self, node):
        if _first_argument(node) is not None:
            yield node.start_pos, node.end_pos

    def mutate(self, node, index):
        text = _first_argument(node).get_code(include_prefix=False)
        return parso.python.tree.Name(f"{node.get_first_leaf().prefix}({text})", (1, 0))

    @classmethod
    def examples(cls):
        return ()


def _first_argument(node):
    if node.type not in ("atom_expr", "power") or len(node.children) < 2:
        return None
    trailer = node.children[-1]
    if trailer.type != "trailer" or trailer.children[0].value != "(":
        return None
    inside = trailer.children[1]
    first = inside.children[0] if inside.type == "arglist" else inside
    return None if inside.type == "operator" or first.type == "argument" else first


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One slip."""

    file: str
    line: int
    operator: str
    code: str

    @property
    def difference(self) -> str:
        before = (ROOT / "jax_layernorm" / self.file).read_text().splitlines()
        lines = difflib.unified_diff(before, self.code.splitlines(), n=0, lineterm="")
        return "\n".join(line for line in lines if line[:3] not in ("---", "+++"))


def executed(code: str) -> str | None:
    """The program without annotations, docstrings and overloads; None if it is none."""
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign):
            node.annotation = ast.Name("_", ast.Load()) if node.annotation else None
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_description(line)] or [
                ast.Pass()
            ]
    return ast.dump(tree)


def _is_description(line: ast.stmt) -> bool:
    """Whether it is a docstring or an overload."""
    if isinstance(line, ast.FunctionDef):
        return any(ast.unparse(d) == "overload" for d in line.decorator_list)
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def mutants_of(file: str) -> dict[tuple[int, int], list[Mutant]]:
    """Every slip in a file, by the place where it is made."""
    code = (ROOT / "jax_layernorm" / file).read_text()
    before = executed(code)
    operators = {name: cosmic_ray.plugins.get_operator(name)() for name in OPERATORS}
    operators["CallToFirstArgument"] = CallToFirstArgument()
    places = collections.defaultdict(list)
    for name, operator in operators.items():
        positions = [
            position
            for node in cosmic_ray.ast.ast_nodes(cosmic_ray.ast.get_ast(code))
            for position, _ in operator.mutation_positions(node)
        ]
        for i, position in enumerate(positions):
            changed = cosmic_ray.mutating.mutate_code(code, operator, i)
            after = None if changed is None else executed(changed)
            if after is not None and after != before:
                places[position].append(Mutant(file, position[0], name, changed))
    return places


def sample(files: list[str], size: int, seed: int) -> list[Mutant]:
    rng = random.Random(seed)
    places = [each for file in files for each in mutants_of(file).values()]
    return [rng.choice(each) for each in rng.sample(places, min(size, len(places)))]


def copy_of_the_tree(folder: pathlib.Path) -> pathlib.Path:
    tree = folder / "tree"
    for name in ("jax_layernorm", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tree)
    from jax_layernorm._kernels import _library

    library = _library.path()
    if library is not None:
        shutil.copy(library, tree / "jax_layernorm" / "_kernels")
    return tree


def run_tests(tree: pathlib.Path, tests: list[str], told: pathlib.Path) -> None:
    """Runs pytest over the copy of the tree until a test fails, in a separate process."""
    os.chdir(tree)
    # Removes the hook of the editable install, so that the copy's package is imported.
    sys.meta_path[:] = [f for f in sys.meta_path if "Scikit" not in type(f).__name__]
    sys.path.insert(0, str(tree))
    sys.dont_write_bytecode = True
    import pytest

    with told.open("w") as file, contextlib.redirect_stdout(file):
        code = pytest.main(["-xqrfE", "-p", "no:cacheprovider", *tests])
    os._exit(code)


def run(mutant: Mutant, trees: queue.Queue) -> tuple[str | None, float]:
    """The test that fails, or None; and the seconds it took."""
    tree, start = trees.get(), time.monotonic()
    path, told = tree / "jax_layernorm" / mutant.file, tree / "told.txt"
    before = path.read_text()
    tests = list(dict.fromkeys(f"tests/{t}.py" for t in TESTS[mutant.file].split()))
    process = CONTEXT.Process(target=run_tests, args=(tree, tests, told))
    try:
        path.write_text(mutant.code)
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
            failed = f"still running after {SECONDS} s"
        else:
            failed = None
            if process.exitcode != 0:
                lines = told.read_text().split("\n")
                found = [a[:99] for a in lines if a.startswith(("FAILED", "ERROR"))]
                failed = (found or [f"exit code {process.exitcode}"])[0]
    finally:
        path.write_text(before)
        trees.put(tree)
    return failed, time.monotonic() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--files", nargs="+", default=list(TESTS), choices=list(TESTS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", help="also write the results here")
    options = parser.parse_args()
    CONTEXT.set_forkserver_preload(PRELOADED)
    drawn = sample(options.files, options.sample, options.seed)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        trees = queue.Queue()
        for i in range(options.workers):
            trees.put(copy_of_the_tree(pathlib.Path(folder, str(i))))
        path = ROOT / "jax_layernorm" / "_arguments.py"
        unchanged = Mutant(path.name, 0, "nothing", path.read_text())
        failed, _ = run(unchanged, trees)
        if failed is not None:
            sys.exit(f"the tests must pass without a slip, but they fail: {failed}")
        with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
            running = {pool.submit(run, mutant, trees): mutant for mutant in drawn}
            for each in concurrent.futures.as_completed(running):
                mutant, (failed, seconds) = running[each], each.result()
                results.append((mutant, failed))
                print(f"{len(results)}/{len(drawn)} {mutant.file}:{mutant.line}"
                      f" {mutant.operator} {seconds:.0f} s: {failed or 'SURVIVED'}",
                      flush=True)  # fmt: skip
                if failed is None:
                    print(mutant.difference, flush=True)
    killed = sum(failed is not None for _, failed in results)
    print(f"\nseed {options.seed}: {killed} of {len(results)} killed")
    if options.json:
        rows = [
            {"file": m.file, "line": m.line, "operator": m.operator, "killed by": failed,
             "difference": m.difference}
            for m, failed in results
        ]  # fmt: skip
        pathlib.Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if killed >= 0.9 * len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
