"""Sphinx: the documentation site, built by ``make docs``."""

from __future__ import annotations

import logging
import re
import shutil
import warnings
from pathlib import Path

import lightning  # it sets the level of its logger
from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

import lightning_pc

DOCS = Path(__file__).parent.resolve()
EXAMPLES = DOCS.parent / "examples"
project = "lightning_pc"
copyright = "the lightning_pc authors"
release = version = lightning_pc.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_gallery.gen_gallery",
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
sphinx_gallery_conf = {  # the build runs every example, and ends where one fails
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "capture_repr": (),  # what a script prints, and no more
    "image_srcset": ["2x"],
    "show_signature": False,
    "write_computation_times": False,
}
# Pages show what an example prints, not what other libraries say beside it.
logging.getLogger(f"{lightning.__name__}.pytorch").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module=r"(lightning|transformers)\.")


class Files(SphinxPostTransform):
    """A link to a file of the repository leads to its page, if it is an example, or to a copy."""

    default_priority = 5

    def run(self, **kwargs: object) -> None:
        """Follows each link of a page."""
        here = Path(self.env.doc2path(self.env.docname)).parent
        up = "../" * self.env.docname.count("/")
        kinds = (addnodes.pending_xref, addnodes.download_reference)  # pages, and other files
        for link in [link for kind in kinds for link in self.document.findall(kind)]:
            path = (here / link.get("reftarget", "").partition("#")[0]).resolve()
            file = path if path.suffix else path.with_suffix(".md")  # MyST has taken it off
            if path.parent == EXAMPLES:
                page = "index" if path.stem == "README" else path.stem
                uri = f"{up}gallery/{page}.html"
            elif isinstance(link, kinds[0]) and file.is_file() and not file.is_relative_to(DOCS):
                within = Path("files") / file.relative_to(DOCS.parent)
                copy = Path(self.app.outdir) / within
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
                uri = up + within.as_posix()
            else:
                continue
            link.replace_self(nodes.reference("", "", *link[0].children, refuri=uri))


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
