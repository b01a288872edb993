"""The pages of docs/results: links, anchors, named files and commands exist, and none is long."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "results"
PAGES = sorted(FOLDER.glob("*.md"))
MOST_WORDS = 1500

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def targets(page: Path) -> list[tuple[str, str]]:
    """Path and anchor of each relative link; one of them may be empty."""
    links = re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text()))
    return [tuple(link.partition("#")[::2]) for link in links if "://" not in link]


@cache
def anchors(page: Path) -> set[str]:
    """Those of its headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for title in re.findall(r"^#+ (.+)$", without_blocks(page.read_text()), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        again = found.get(slug, 0)
        found[slug] = again + 1
        if again:
            found[f"{slug}-{again}"] = 1
    return set(found)


def missing_links(page: Path) -> list[str]:
    wrong = []
    for path, anchor in targets(page):
        file = (page.parent / path).resolve() if path else page
        if not file.is_file() or (anchor and anchor not in anchors(file)):
            wrong.append(f"{path}#{anchor}")
    return wrong


def missing_files(text: str) -> list[str]:
    named = re.findall(r"\b(?:recipes|tests)/[\w/]+\.(?:yaml|json|md|png|py)\b", text)
    return [name for name in named if not (ROOT / name).is_file()]


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def missing_modules(text: str) -> list[str]:
    named = set(re.findall(r"(?<![\w/.])recipes(?:\.\w+)+", text))
    return [name for name in sorted(named) if not is_module(name)]


def words(text: str) -> int:
    """Those with a letter or a digit: the bars of a table are none."""
    return len([word for word in text.split() if re.search(r"\w", word)])


@every_page
def test_links_lead_somewhere(page):
    assert not missing_links(page)


@every_page
def test_named_files_exist(page):
    assert not missing_files(page.read_text())


@every_page
def test_commands_name_modules(page):
    assert not missing_modules(page.read_text())


@every_page
def test_no_page_is_long(page):
    assert words(page.read_text()) <= MOST_WORDS


@every_page
def test_a_command_is_named_at_the_top(page):
    opening = page.read_text().split("\n## ")[0]
    exempt = {
        "index": "no figures of its own",
        "again-after-recording": "in the table",
        "loss-warning": "by hand",
    }
    assert page.stem in exempt or re.search(r"-m recipes\.\w+|--out recipes/", opening)


def test_the_index_lists_every_page():
    (tree,) = re.findall(
        r"^```\{toctree\}\n(.*?)^```$", (FOLDER / "index.md").read_text(), re.DOTALL | re.MULTILINE
    )
    listed = [line for line in tree.splitlines() if line and not line.startswith(":")]
    assert sorted(listed) == sorted(page.stem for page in PAGES if page.stem != "index")


def test_what_is_missing_is_told(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n[a](#a-page) [b](page.md#a-page) [c](gone.md) [d](page.md#no)\n")
    assert missing_links(page) == ["gone.md#", "page.md#no"]
    assert missing_files("`recipes/gone.json`, `recipes/README.md`") == ["recipes/gone.json"]
    assert missing_modules("`python -m recipes.gone`, `python -m recipes.report`") == [
        "recipes.gone"
    ]
