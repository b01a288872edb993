"""What pyproject.toml claims is what was tested, and an extra that is missing is named."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_pc.errors import from_extra

ROOT = Path(__file__).parents[2]


def bounds():
    """Package -> lowest version, of all dependencies and extras."""
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"(?ms)^(?:dependencies|\w+) = (\[.*?\])$", text.split("[tool.", 1)[0])
    found = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', " ".join(lists))
    return {name.lower().replace("-", "_"): version for name, version in found}


def pins(name):
    lines = re.findall(r"(?m)^([\w-]+)==([\w.]+)", (ROOT / name).read_text())
    return {package.lower().replace("-", "_"): version for package, version in lines}


def short(version):
    """Without zeros at its end."""
    return re.sub(r"(\.0)+$", "", version)


def test_the_lowest_versions_are_the_bounds():
    claimed, tested = bounds(), pins("constraints-lowest.txt")
    assert {"torch", "lightning", "transformers", "jsonargparse", "pytest"} <= set(claimed)
    assert set(claimed) == set(tested)
    for name, version in claimed.items():
        assert short(version) == short(tested[name]), name


def test_what_is_developed_with_is_pinned():
    assert set(bounds()) <= set(pins("constraints.txt"))


def test_a_package_of_an_extra_is_named():
    with (
        pytest.raises(
            ModuleNotFoundError, match=r"No module named 'nothing'.*lightning_pc\[some\]"
        ),
        from_extra("some", "nothing"),
    ):
        raise ModuleNotFoundError(name="nothing")
    with (
        pytest.raises(ModuleNotFoundError, match="another"),
        from_extra("some", "nothing"),
    ):
        raise ModuleNotFoundError("another", name="another")


HIDES = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *rest):
        hidden = name.partition(".")[0] == "{missing}"
        return None if hidden else self.finder.find_spec(name, *rest)

    def find_distributions(self, context):
        if context.name == "{missing}" or not hasattr(self.finder, "find_distributions"):
            return []
        return self.finder.find_distributions(context)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


@pytest.mark.parametrize(
    ("missing", "code", "extra"),
    [
        ("matplotlib", "import lightning_pc.plots as p; p.plot_energy(None)", "plots"),
        ("transformers", "import lightning_pc.hugging_face", "transformers"),
        ("accelerate", "import lightning_pc.hugging_face", "transformers"),
        ("jsonargparse", "import lightning_pc.cli", "recipes"),
    ],
)
def test_an_extra_that_is_missing(missing, code, extra):
    run = subprocess.run(
        [sys.executable, "-c", HIDES.format(missing=missing) + code], capture_output=True, text=True
    )
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ")
    assert f"pip install 'lightning_pc[{extra}]'" in last
