"""The numbers in README.md are those in `benchmarks/results`."""

import pytest

pytest.importorskip("benchmarks.support", reason="no benchmarks here")

from benchmarks import readme_numbers


def test_readme_has_the_numbers_of_the_results():
    page = readme_numbers.README.read_text()
    fix = "python -m benchmarks.readme_numbers --write"
    assert readme_numbers.filled(page) == page, f"the results differ; run {fix}"


@pytest.mark.parametrize("name", readme_numbers.TEXTS)
def test_another_number_is_noticed(name):
    page = readme_numbers.README.read_text()
    text = readme_numbers.TEXTS[name]()
    digit = next(c for c in text if c.isdigit())
    changed = text.replace(digit, "7" if digit != "7" else "8", 1)
    other = page.replace(text, changed)
    assert other != page
    assert readme_numbers.filled(other) == page


def test_missing_comments_are_named():
    with pytest.raises(ValueError, match="<!-- numbers -->"):
        readme_numbers.filled("# A page without them")


def test_recorded_memory_is_what_the_norm_keeps():
    """Bytes do not depend on the device, but Flax's may on its version."""
    pytest.importorskip("flax", reason="needs Flax")
    recorded = {r["norm"]: r for r in readme_numbers.load("memory")["results"]}
    counted = {r["norm"]: r for r in readme_numbers.memory()}
    assert counted["ours"] == recorded["ours"]
    assert counted["flax"]["bytes an element"] > 4 * counted["ours"]["bytes an element"]


def test_printed_and_written(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="draws a picture")
    page, picture = tmp_path / "README.md", tmp_path / "readme.png"
    page.write_text(readme_numbers.README.read_text().replace(" times", " miles"))
    monkeypatch.setattr(readme_numbers, "README", page)
    monkeypatch.setattr(readme_numbers, "PICTURE", picture)
    readme_numbers.main(["--write"])
    assert "Flax's norm takes" in capsys.readouterr().out
    assert readme_numbers.filled(page.read_text()) == page.read_text()
    assert picture.stat().st_size > 0
