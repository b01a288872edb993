"""The tests' own house: who may import what, so that each file can be read and run alone."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDERS = ("engine", "recipes", "pages")


def imported(source: str) -> set[str]:
    """The modules that a file imports, wherever it does so."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def wrong(source: str, folder: str, beside: set[str]) -> set[str]:
    """What a file of a folder must not import."""
    return {
        name
        for name in imported(source)
        if name.startswith(".")  # not by its full name
        or name.split(".")[0] in beside  # nor as if its folder were on the path
        or (
            name.startswith("tests.")
            and (
                "conftest" in name
                or any(part.startswith("test_") for part in name.split("."))
                or name.split(".")[1] in set(FOLDERS) - {folder}
            )
        )
    }


FILES = sorted(TESTS.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(TESTS).as_posix())
def test_it_imports_no_test_file_and_no_other_folder(file):
    folder = file.relative_to(TESTS).parts[0]
    assert not wrong(file.read_text(), folder, {other.stem for other in FILES} - {"__init__"})


@pytest.mark.parametrize(
    "line",
    [
        "from tests.engine.test_zil import compare",
        "from tests.engine import test_zil",
        "import tests.engine.test_zil",
        "from tests.recipes.test_sweep import grid",
        "from tests.pages.examples import blocks",
        "from tests.engine.conftest import graphs",
        "from problems import vectors",
        "import oracle",
        "from .problems import vectors",
        "def test_inside():\n    from tests.engine.test_zil import compare",
    ],
)
def test_what_is_wrong_is_found(line):
    assert wrong(line, "engine", {"problems", "oracle"})


@pytest.mark.parametrize(
    "line",
    [
        "from tests.engine.problems import PROBLEMS",
        "from tests.compare import far",
        "from recipes.parity import study",
        "import torch",
    ],
)
def test_what_is_right_is_left(line):
    assert not wrong(line, "engine", {"problems", "oracle"})
