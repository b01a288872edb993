"""Curves against simultaneous matrix multiplications: what they count, who comes first."""

import json

import pytest
import torch

from recipes.common.queue import main
from recipes.efficiency import simultaneous as study
from recipes.stability.data import Images


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Learnable images in place of MNIST's, few points."""

    def images(folder, train, test):
        torch.manual_seed(0)
        made = []
        for count in (train, test):
            labels = torch.arange(count) % 10
            pixels = torch.randn(count, 1, 28, 28)
            pixels[torch.arange(count), 0, 0, labels] += 20
            made.append((pixels, labels))
        return Images(*made)

    monkeypatch.setattr(study, "DATA", {"mnist": images})
    monkeypatch.setattr(study, "POINTS", 4)
    monkeypatch.setattr(study, "LAYERS", (3,))
    monkeypatch.setattr(study, "SIZES", ({"seeds": (0,), "images": 40, "smms": 400},))


def test_the_paper_s_order(tmp_path):
    """iPC reaches a loss with the fewest, PC the later the more steps it takes."""
    main(study.STUDY, ["--out", str(tmp_path / "found.json")])
    found = {
        e["settings"]["row"]: e["figures"]
        for e in json.loads((tmp_path / "found.json").read_text())["jobs"]
    }
    counts = {row: figures["smms_per_update"] for row, figures in found.items()}
    assert counts == {
        "BP": 5,
        "Z-IL": 4,
        "PC, T = 8": 16,
        "PC, T = 12": 24,
        "PC, T = 16": 32,
        "iPC": 2,
    }
    assert {row: figures["updates"] for row, figures in found.items()} == {
        row: -(-400 // count) for row, count in counts.items()
    }
    order = sorted(found, key=lambda row: found[row]["loss"][-1])
    assert order == ["iPC", "Z-IL", "BP", "PC, T = 8", "PC, T = 12", "PC, T = 16"]
    assert (tmp_path / "found.png").exists()


def test_what_is_needed():
    assert study.needed([4.0, 2.0, 1.0], 100, 2.0) == 50
    assert study.needed([4.0, 2.0, 1.0], 100, 0.5) is None
