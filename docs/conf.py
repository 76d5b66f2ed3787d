"""Sphinx settings of the documentation: ``sphinx-build -W docs docs/_build``."""

from __future__ import annotations

import loracle

project = "loracle"
author = "the loracle contributors"
copyright = author
release = version = loracle.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3  # so that links to headings are checked
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

html_theme = "furo"
html_title = "loracle"
