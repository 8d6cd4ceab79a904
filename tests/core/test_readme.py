"""What the README and the docs show runs, and prints what they say."""

import contextlib
import io
import pathlib
import re

import implementations
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("page", "needs"),
    [
        ("README.md", ""),
        ("docs/index.md", ""),
        ("docs/layer-norm.md", ""),
        ("docs/switching-from-flax.md", ""),
        ("docs/training-and-serving.md", ""),
        ("docs/guides/functions.md", ""),
        ("docs/guides/modules.md", ""),
        ("docs/guides/masks.md", ""),
        ("docs/guides/adaptive-norm.md", ""),
        ("docs/guides/mixed-precision.md", ""),
        ("docs/guides/memory-and-remat.md", ""),
        ("docs/guides/derivatives.md", ""),
        ("docs/guides/export-and-serving.md", ""),
        ("docs/guides/own-norm.md", ""),
        ("docs/scaling.md", ""),
        ("docs/switching-from-torch.md", ""),
        ("docs/switching-from-torch.md", "safetensors"),
        ("docs/switching-from-torch.md", "torch"),
    ],
)
def test_the_python_of_a_page_runs_and_prints_what_it_says(page, needs):
    """Block after block; one that starts with ```python PACKAGE needs that package."""
    if needs:
        pytest.importorskip(needs, reason=f"needs {needs}, which is not installed")
    if page == "docs/guides/export-and-serving.md":  # it shows what the kernel promises
        implementations.needed("native_cpu")
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python ?(\w*)\n(.*?)^```", text, re.DOTALL | re.M)
    assert needs in [package for package, _ in blocks]
    namespace = {}
    for package, block in blocks:
        if package not in ("", needs):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, page, "exec"), namespace)
        promised = re.findall(r"^\s*(?:print\(.*)?\)  # (.*)", block, re.M)
        assert printed.getvalue().splitlines() == promised


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.M)
    assert {"train", "test"} <= set(commands) <= set(targets)
