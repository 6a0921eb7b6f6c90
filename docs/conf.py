"""The site of these pages, by Sphinx: `make docs`. What is not Markdown here is not part of it."""

from __future__ import annotations

import re
from pathlib import Path

_VERSION = Path(__file__).parent.parent / "loraformat" / "_version.py"

project = "loraformat"
author = "the loraformat authors"
release = re.findall(r'__version__ = "(.+?)"', _VERSION.read_text(encoding="utf-8"))[0]
extensions = ["myst_parser", "sphinx_copybutton"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["_build", "pictures"]
# A hundred pages of codes and twenty of formats and decisions are reached from their tables, not from the side.
suppress_warnings = ["toc.not_included"]
myst_heading_anchors = 4
myst_enable_extensions = ["colon_fence", "attrs_inline"]
myst_url_schemes = {"http": None, "https": None, "mailto": None}
copybutton_prompt_text = "$ "
html_theme = "furo"
html_title = "loraformat"
html_static_path: list[str] = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0f5a9a", "color-brand-content": "#0f5a9a"},
    "dark_css_variables": {"color-brand-primary": "#7dbcf0", "color-brand-content": "#7dbcf0"},
    "navigation_with_keys": True,
}
# Pages outside of this folder, and files that a page names: on the site they stand in the repository.
_REPOSITORY = "https://github.com/OWNER/loraformat/blob/main/"


def _outward(app: object, docname: str, source: list[str]) -> None:
    """Links that leave the folder lead to the repository, but for the page that is built into the site."""
    del app
    depth = docname.count("/")
    up = "../" * (depth + 1)
    page = rf'<a href="{"../" * depth}browser/index.html">\1</a>'
    source[0] = re.sub(rf"\[([^\]]+)\]\({re.escape(up)}web/index\.html\)", page, source[0])
    source[0] = re.sub(rf"\]\({re.escape(up)}(?!\.\./)([^)]+)\)", rf"]({_REPOSITORY}\1)", source[0])


def setup(app: object) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _outward)  # type: ignore[attr-defined]
