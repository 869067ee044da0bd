"""Sphinx's configuration; `make docs` builds the pages into docs/_build/html."""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(_HERE), str(_HERE.parent), str(_HERE.parent / "platform")]

project = "ShareGPT4V platform"
author = "The authors of the ShareGPT4V platform"
extensions = ["myst_parser", "sphinx.ext.autodoc", "generated"]
default_role = "code"
smartquotes = False  # "" is an empty text
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]
autodoc_class_signature = "separated"  # models are made by load
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 72

html_theme = "furo"
html_title = project
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False
html_show_copyright = False
