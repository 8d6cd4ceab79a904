"""Execute the notebooks and write them with their outputs: `python notebooks/build.py`.

Edit the `.py`, then run this, for all notebooks or for those named. It does what
`jupytext --to ipynb --execute` does, but leaves out what differs between runs and
machines: timestamps, random cell ids, the Python version. It fails if a cell writes to
stderr, because the outputs are committed and a warning would stay in them.
"""

import argparse
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent
LANGUAGE = {"name": "python", "file_extension": ".py", "pygments_lexer": "ipython3"}


def build(source: Path) -> None:
    """Write `source` as an executed notebook beside it."""
    notebook = jupytext.read(source)
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=600,
        record_timing=False,
        resources={"metadata": {"path": str(FOLDER)}},
    ).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise SystemExit(f"{source.name}, cell {number}: {output.text}")
    notebook.metadata["language_info"] = LANGUAGE
    notebook.metadata["jupytext"].pop("text_representation")  # `--sync` drops it too
    nbformat.validate(notebook)
    nbformat.write(notebook, source.with_suffix(".ipynb"))
    print(f"wrote {source.with_suffix('.ipynb').name}")


def main() -> None:
    """Build all notebooks, or those named on the command line."""
    parser = argparse.ArgumentParser(description="Execute the notebooks.")
    names = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "build")
    parser.add_argument("names", nargs="*", help=", ".join(names))
    for name in parser.parse_args().names or names:
        build(FOLDER / f"{name}.py")


if __name__ == "__main__":
    main()
