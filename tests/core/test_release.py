"""What a release must agree on: the version, and the files that go with it."""

import importlib.metadata
import importlib.resources
import pathlib
import re
import tomllib

import pytest

import jax_layernorm as jln

ROOT = pathlib.Path(__file__).parents[2]


def read(name):
    """The text of a file that an installed copy of the tests may lack."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not beside these tests")
    return path.read_text()


def citation():
    """The fields of CITATION.cff that are one line each, without quotation marks."""
    lines = re.findall(r"^([\w-]+): (.+)$", read("CITATION.cff"), re.M)
    return {key: value.strip('"') for key, value in lines}


def test_the_citation_has_the_version_of_the_package():
    assert citation()["version"] == jln.__version__


def test_the_citation_has_the_name_and_the_license_of_the_package():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert citation()["title"].replace("_", "-") == project["name"]
    assert citation()["license"] == project["license"]
    assert citation()["abstract"].rstrip(".") == project["description"]


def test_what_is_installed_has_the_version_of_the_package():
    if (ROOT / "jax_layernorm").exists():
        pytest.skip("an editable install keeps the version of the day it was made")
    assert importlib.metadata.version("jax-layernorm") == jln.__version__


def test_the_version_is_major_minor_patch():
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", jln.__version__)


def test_the_changelog_has_the_version_or_what_is_not_released_yet_on_top():
    headings = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.M)
    assert headings[0] in ("Unreleased", jln.__version__)


def test_type_checkers_find_the_marker_of_typed_packages():
    assert (importlib.resources.files("jax_layernorm") / "py.typed").is_file()


def test_each_python_that_is_named_is_one_that_may_install_the_package():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    named = re.findall(r"Python :: 3\.(\d+)", "\n".join(project["classifiers"]))
    oldest = re.fullmatch(r">=3\.(\d+)", project["requires-python"])[1]
    assert min(map(int, named)) == int(oldest)
