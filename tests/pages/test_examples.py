"""The scripts of examples/: what the documentation build, which runs them, does not check."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
#: What the extra ``docs`` brings, with what the package itself needs.
BROUGHT = {"lightning_pc", "torch", "lightning", "torchmetrics"}
BROUGHT |= {"matplotlib", "peft", "sklearn", "transformers"}
#: Calls that may ask a network.
FETCHES = r"\b(fetch_\w+|from_pretrained|snapshot_download|hf_hub_download|urlopen|load_dataset)\b"
HYPE = r"\b(simply|just|easily|powerful|seamless\w*|leverag\w+|comprehensive|state-of-the-art)\b"

every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def prose(script: Path) -> list[str]:
    """The docstring and the text of each cell, without the markup of titles."""
    text = script.read_text()
    cells = re.findall(r"(?m)^# %%\n((?:# .*\n)+)", text)
    docstring = ast.get_docstring(ast.parse(text)) or ""
    return [docstring, *(re.sub(r"(?m)^# ", "", cell) for cell in cells)]


def test_there_are_scripts():
    assert len(SCRIPTS) >= 8


@every_script
def test_length_and_cells(script):
    text = script.read_text()
    assert 30 <= len(text.splitlines()) <= 90
    title, underline, blank = prose(script)[0].splitlines()[:3]
    assert re.fullmatch(r"[A-Z].*[^.]", title)
    assert underline == "=" * len(title)
    assert blank == ""
    assert len(prose(script)) == 1 + text.count("# %%")  # no cell goes without prose
    assert text.count("# %%") >= 2


@every_script
def test_imports_are_brought_by_the_extra(script):
    found = set()
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    modules = {name.partition(".")[0] for name in found}
    assert modules - BROUGHT <= sys.stdlib_module_names


@every_script
def test_no_network(script):
    assert re.findall(FETCHES, script.read_text()) == []


@every_script
def test_links_lead_to_pages(script):
    """They are written for the site, ../guides/speed.html; Sphinx takes them as they are."""
    for target in re.findall(r"<(\S+)>`_", script.read_text()):
        page = re.fullmatch(r"\.\./(.+)\.html", target)
        assert page, target
        assert (ROOT / "docs" / f"{page[1]}.md").is_file(), target


@every_script
def test_plain_words(script):
    for part in prose(script):
        assert re.findall(HYPE, part, re.IGNORECASE) == []
        body = re.sub(r"(?s)^.*?\n=+\n", "", re.sub(r"`([^`<]*)<[^>]*>`_", r"\1", part))
        for sentence in re.split(r"[.:?;]\s", " ".join(body.split())):
            assert len(sentence.split()) <= 25, sentence
