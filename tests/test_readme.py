"""What the README shows runs, and prints what it says."""

import contextlib
import io
import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_python_of_the_readme_runs_and_prints_what_it_says():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, str(README), "exec"), {})
        promised = re.findall(r"print\(.*\)  # (.*)", block)
        assert printed.getvalue().splitlines() == promised


def test_the_commands_of_the_readme_are_targets_of_the_makefile():
    targets = re.findall(r"^(\w+):", (README.parent / "Makefile").read_text(), re.M)
    commands = re.findall(r"^make (\w+)", README.read_text(), re.M)
    assert {"train", "test"} <= set(commands) <= set(targets)
