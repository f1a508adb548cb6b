"""Builds the pages of this folder into a site: sphinx-build -W -b html docs build/docs."""

import os
import pathlib
import re
import sys

from sphinx.application import Sphinx

import flax_cifar

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(DOCS))  # for the extension networks.py

# Where the files of this repository can be seen, such as https://HOST/OWNER/flax_cifar/blob/main.
# Without it, the site has copies of the files that its pages link to.
REPOSITORY = os.environ.get("FLAX_CIFAR_REPOSITORY", "").rstrip("/")
PAGES = (".md", ".ipynb")
IMAGES = (".png", ".svg")
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<path>[\w./-]+)(?P<anchor>#[\w-]+)?\)")

project = flax_cifar.__name__
version = release = flax_cifar.__version__
author = "The flax_cifar maintainers"
copyright = f"{author}, Apache 2.0"

extensions = [
  "myst_nb",
  "sphinx.ext.autodoc",
  "sphinx.ext.napoleon",
  "sphinx.ext.viewcode",
  "networks",
]
html_theme = "furo"
html_title = f"{project} {version}"
smartquotes = False  # they would turn the two dashes of a flag into one
highlight_language = "none"  # of indented blocks, most of which are commands

myst_heading_anchors = 4  # headings have the anchors that GitHub gives them
nb_execution_mode = "off"  # tests/test_notebook.py executes the notebook

default_role = "code"  # of `single backticks` in docstrings
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 80
napoleon_use_rtype = False


def link_files(app: Sphinx, page: str, source: list[str]) -> None:
  """Links each file that is no page of the site to the repository, or to a copy of it."""
  folder = (DOCS / page).parent

  def link(match: re.Match[str]) -> str:
    path = (folder / match["path"]).resolve()
    if path.is_relative_to(DOCS) and path.suffix in PAGES + IMAGES:
      return match[0]
    if REPOSITORY:
      return f"[{match['text']}]({REPOSITORY}/{path.relative_to(ROOT).as_posix()})"
    return match["text"] if path.is_dir() else f"[{match['text']}](path:{match['path']})"

  source[0] = LINK.sub(link, source[0])


def setup(app: Sphinx) -> None:
  app.connect("source-read", link_files)
