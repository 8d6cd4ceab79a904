"""What the README and the pages in docs/ show runs, and prints what they say."""

import contextlib
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [
    page
    for page in (README, *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in page.read_text()
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_python_of_a_page_runs_and_prints_what_it_says(page):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {}  # a block may use what the blocks above it have defined
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(page), "exec"), names)
        promised = re.findall(r"print\(.*\)  # (.*)", block)
        assert printed.getvalue().splitlines() == promised


def test_the_readme_and_the_page_on_flax_show_python():
    assert {"README.md", "switching-from-flax.md"} <= {page.name for page in PAGES}


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    commands = re.findall(r"^make (\w+)", README.read_text(), re.M)
    assert {"train", "test"} <= set(commands) <= set(targets)
