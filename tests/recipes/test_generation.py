"""Energies of generative networks, and memories: what they measure, on made-up pictures."""

from __future__ import annotations

import pytest
import torch

from recipes.generation import energy
from recipes.memory import recall


def made_up(name, count, data_dir=None):
    """Pictures of twelve numbers, mixed of four causes."""
    draw = torch.Generator().manual_seed(0)
    return torch.tanh(torch.randn(count, 4, generator=draw) @ torch.randn(4, 12, generator=draw))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(energy, "pictures", made_up)
    monkeypatch.setattr(recall, "pictures", made_up)
    monkeypatch.setattr(energy, "RATE", 1e-2)
    monkeypatch.setattr(energy, "WIDTHS", (8,))
    monkeypatch.setattr(recall, "WIDTHS", (8,))


def test_energies(small):
    job = {"data": "cifar10", "layers": 4, "width": 8, "seed": 0, "steps": 240, "size": 0}
    rows = [{**job, "row": row, **energy.run({**job, "row": row})} for row in energy.ROWS]
    x = made_up("", 100)
    torch.manual_seed(0)
    net = energy.Generator(4, 8, 12).eval()
    start = 0.5 * (net(100) - x).square().sum() / 100
    for row in rows:
        assert row["energy"][0] == pytest.approx(float(start), abs=1e-3)
        assert len(row["energy"]) == energy.POINTS
    last = {row["row"]: row["last"] for row in rows}
    errors = {row["row"]: row["error"] for row in rows}
    assert last["iPC"] < 0.5 * min(value for name, value in last.items() if name != "iPC")
    assert errors["iPC"] < 0.2
    (table,) = energy.tables(rows)
    assert table.row_count == 1
    assert len(energy.picture(rows).axes) == 1


def test_needed():
    assert energy.needed([3.0, 2.0, 1.0], 100, 2.0) == "50"
    assert energy.needed([3.0, 2.0, 1.0], 100, 0.5) == "-"


def test_every_panel_is_run_once():
    jobs = energy.jobs()
    panels = {(j["data"], j["layers"], j["width"], j["row"], j["seed"]) for j in jobs}
    assert len(jobs) == len(panels) == 2 * 2 * 3 * 4
    assert {(j["width"], j["count"]) for j in recall.jobs()} == {
        (width, count) for width in recall.WIDTHS for count in recall.COUNTS
    }


def test_a_memory(small):
    """Few pictures are recalled, more than it has units are not."""
    job = {"width": 8, "seed": 0, "batches": 150, "size": 0}
    rows = [{**job, "count": n, **recall.run({**job, "count": n})} for n in (5, 100)]
    assert rows[0]["half"] < 0.2
    assert rows[0]["noise"] < 0.2
    assert rows[0]["half"] < 0.5 * rows[1]["half"]
    assert [table.row_count for table in recall.tables(rows)] == [1, 1]


def test_what_a_cue_gives():
    x = made_up("", 6)
    net = recall.store(x, 8, 1, 0)
    half, noisy = (recall.recall(net, x, cue, 0) for cue in recall.CUES)
    assert torch.equal(half.cue[:, :6], x[:, :6])
    assert half.cue[:, 6:].unique().numel() == 1
    assert float((noisy.cue - x).std()) == pytest.approx(recall.NOISE, rel=0.2)
    asked = slice(6, None)
    error = (half.found - x)[:, asked].square().sum() / (x - x.mean(0))[:, asked].square().sum()
    assert half.error == pytest.approx(float(error))
