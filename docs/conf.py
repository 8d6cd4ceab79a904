"""How Sphinx builds the site: `make docs`.

The source folder is the repository, and not `docs`. So a page can link to a notebook or
an example by its path, and the link works both on the site and in the repository.
"""

import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # autodoc imports the package

import jax_layernorm

project = "jax_layernorm"
author = "the authors of jax_layernorm"
project_copyright = "the authors of jax_layernorm, Apache License 2.0"
version = release = jax_layernorm.__version__

root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/*.ipynb",
    "examples/*/README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [
    ".*", "benchmarks", "build", "dist", "jax_layernorm", "runs", "tests",
    "**/.ipynb_checkpoints",
]  # fmt: skip

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.githubpages",  # tells GitHub Pages to serve folders like _static
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # the formulas need no network either
]

nb_execution_mode = "off"  # a notebook is shown with the outputs that it stores
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # the anchors that GitHub makes

autodoc_typehints = (
    "none"  # the docstrings say more, and overloads would repeat each name
)
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

html_theme = "sphinx_book_theme"  # with a light and a dark mode
html_title = "jax_layernorm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the sidebar has the search field
    "show_toc_level": 2,
}
html_show_sphinx = False

LINKED = {
    name: f":func:`~jax_layernorm.{name.removeprefix('jax_layernorm.')}`"
    for function in (
        "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm", "init_params",
    )
    for name in (function, f"jax_layernorm.{function}")
}  # fmt: skip


def as_rst(app, what, name, obj, options, lines):
    """Turns a docstring into what napoleon reads: ours are closer to Markdown."""
    text = "\n".join(lines)
    if name.endswith("Norm"):  # the attributes of a linen module are its arguments
        text = text.replace("\nAttributes:\n", "\nArgs:\n")
    # Names of arguments that share a description may go over several lines.
    while text != (text := re.sub(r"^(  [\w, ]+,)\n {4}", r"\1 ", text, flags=re.M)):
        pass
    # An indented block after a paragraph is a formula or code.
    text = re.sub(r"^(\S.*\n)\n(?= {4})", r"\1\n::\n\n", text, flags=re.M)

    def code(match):
        if match[1] in LINKED:
            return LINKED[match[1]]
        return f"``{match[1]}``" + (r"\ " if match[2] else "")

    text = re.sub(r"(?<!`)`([^`]+)`(?!`)(?=(\w)?)", code, text)
    lines[:] = text.split("\n")


def short_signature(app, what, name, obj, options, signature, returned):
    """Leaves out what linen adds to a module, and names its defaults."""
    if signature and what == "class":
        signature = re.sub(r", parent=<.*>, name=None", "", signature)
        signature = re.sub(
            r"<(?:class|function) '?(?:[\w.]*\.)?(\w+)'?>", r"\1", signature
        )
    return signature, returned


def github_anchors(app, docname, source):
    """Jupyter's anchors in a notebook, as in `#1.-One-token`, become GitHub's."""
    if docname.startswith("notebooks/"):
        source[0] = re.sub(
            r"(?<=\]\(#)[^)\s]+(?=\))",
            lambda match: re.sub(r"[^-\w]", "", match[0].lower()),
            source[0],
        )


def start_at_the_start_page(app, exception):
    """The pages lie under docs/ as in the repository; the top of the site leads there."""
    Path(app.outdir, "index.html").write_text(
        '<!doctype html><meta charset="utf-8"><title>jax_layernorm</title>\n'
        '<meta http-equiv="refresh" content="0; url=docs/index.html">\n'
        '<a href="docs/index.html">jax_layernorm</a>\n'
    )


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", as_rst, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", short_signature)
    app.connect("source-read", github_anchors)
    app.connect("build-finished", start_at_the_start_page)
