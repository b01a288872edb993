"""The pages of the site: their examples run, their links lead somewhere, they stay short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.pages.examples import batches, blocks, pretrained, rows

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    p for p in sorted(DOCS.rglob("*.md")) if "results" not in p.parts and "_build" not in p.parts
]
START = DOCS / "getting_started.md"
EXAMPLES = [page for page in PAGES if blocks(page, "python")]


def name(page):
    return page.relative_to(DOCS).as_posix()


@pytest.mark.parametrize("page", EXAMPLES, ids=name)
@pytest.mark.filterwarnings("ignore")
def test_examples_run_in_order(page, tmp_path, monkeypatch):
    """A page that says so goes on from Getting started."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict = {"__name__": "docs", "batches": batches(), "sentences": rows()}
    pretrained().save_pretrained("pretrained")
    goes_on = "from [Getting started]" in page.read_text()
    for source in [START, page] if goes_on else [page]:
        for number, block in enumerate(blocks(source, "python")):
            exec(compile(block, f"{name(source)}, example {number}", "exec"), space)


def test_getting_started_tells_what_is_printed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "docs"}
    for block in blocks(START, "python"):
        exec(block, space)
    printed = capsys.readouterr().out
    assert "2 2 ['net.1', 'net.3']" in printed
    table = [line.split() for line in blocks(START, "text")[0].splitlines() if "│" in line]
    for row in table:
        assert any(line.split() == row for line in printed.splitlines()), row
    right = space["model"].net(space["images"]).argmax(1) == space["labels"]
    assert right.float().mean() > 0.95
    assert "Verdict: healthy." in printed


def anchors(page):
    heads = re.findall(r"(?m)^#+ (.*)$", re.sub(r"(?s)```.*?```", "", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    text = re.sub(r"(?s)```.*?```", "", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_pages_are_short(page):
    words = [word for word in page.read_text().split() if re.search(r"\w", word)]
    assert len(words) <= 1500
