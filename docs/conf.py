"""Sphinx: the documentation site, built by ``make docs``."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

import lightning_pc

DOCS = Path(__file__).parent.resolve()
project = "lightning_pc"
copyright = "the lightning_pc authors"
release = version = lightning_pc.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "lightning_pc"
exclude_patterns = ["_build"]
nitpicky = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
default_role = "code"
intersphinx_mapping: dict[str, tuple[str, None]] = {}  # the build asks for no network


class Files(SphinxPostTransform):
    """A link to a file of the repository that is no page leads to a copy of it."""

    default_priority = 5

    def run(self, **kwargs: object) -> None:
        """Follows each link of a page."""
        here = Path(self.env.doc2path(self.env.docname)).parent
        up = "../" * self.env.docname.count("/")
        for link in [*self.document.findall(addnodes.pending_xref)]:
            path = (here / link.get("reftarget", "").partition("#")[0]).resolve()
            file = path if path.suffix else path.with_suffix(".md")  # MyST has taken it off
            if not file.is_file() or file.is_relative_to(DOCS):
                continue
            within = Path("files") / file.relative_to(DOCS.parent)
            copy = Path(self.app.outdir) / within
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            link.replace_self(
                nodes.reference("", "", *link.children, refuri=up + within.as_posix())
            )


def shapes(
    app: Sphinx, what: str, name: str, of: object, options: object, lines: list[str]
) -> None:
    """The star of a shape, [B, *], is no emphasis."""
    for number, line in enumerate(lines):
        lines[number] = re.sub(r"\[[^\]]*\*[^\]]*\]", lambda m: m[0].replace("*", r"\*"), line)


def setup(app: Sphinx) -> None:
    """Adds both."""
    app.add_post_transform(Files)
    app.connect("autodoc-process-docstring", shapes)
