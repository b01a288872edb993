"""The cost benchmark: what it measures and how it divides, on tiny networks; no times."""

import json
import sys

import pytest
import torch
from torch import nn

from recipes.efficiency import cost
from recipes.efficiency.memory import peak_bytes
from recipes.efficiency.networks import Transformer, deep, tiny_bert

ROWS = ["backprop", "zil", "spiking", "ipc", "pc", "auto", "ipc, defaults", "pc, defaults"]
ROWS += ["zil, by hand", "ipc, by hand"]


def net():
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    blocks = (lambda: Transformer(depth=2, width=8), (3, 8), 4, 1)
    monkeypatch.setattr(cost, "NETWORKS", {"mlp": (net, (8,), 4, 2), "blocks": blocks})
    memory = [("mlp", 8, "auto", 1.0, 2.0), ("blocks", 3, "blocks", 0.25, 0.0)]
    monkeypatch.setattr(cost, "MEMORY", memory)


@pytest.fixture
def clock(monkeypatch):
    """A processor whose every batch takes as many seconds as it has evaluations, backprop one."""
    spent = [0.0]
    ordinary = cost.Learner.__call__

    def timed(self):
        ordinary(self)
        by_hand = self.algorithm is cost.ByHand
        steps = self.optimizer.T if by_hand else self.algorithm and self.optimizer.report.steps
        spent[0] += steps or 1

    monkeypatch.setattr(cost.Learner, "__call__", timed)
    monkeypatch.setattr(cost.time, "process_time", lambda: spent[0])


@pytest.mark.usefixtures("clock")
def test_rows_of_cost_are_in_batches_of_backprop(monkeypatch):
    limits = {"zil": {"mlp": (1.0, 2.0)}, "ipc": {"mlp": (None, 7.9)}}
    monkeypatch.setattr(cost, "LIMITS", cost.LIMITS | limits)
    results = cost.measure_cost("mlp", rounds=1, look=20, settled=1)
    assert [row["row"] for row in results] == ROWS
    assert results[0] == {"network": "mlp", "row": "backprop", "ms": 1e3}
    rows = {row["row"]: row for row in results[1:]}
    assert {name: row["T"] for name, row in rows.items()} == dict(
        zip(ROWS[1:], (2, 2, 8, 9, 2, 8, 8, 2, 8), strict=True)
    )
    assert all(row["ratio"] == row["T"] for row in rows.values())
    assert rows["zil"]["met"]
    assert not rows["ipc"]["met"]
    pc = rows["pc, defaults"]
    assert pc["of_given"] == pytest.approx(8 / 9)
    assert pc["of_given_per_step"] == pytest.approx(1)
    assert pc["limit"] == 1.1
    assert pc["met"]


@pytest.mark.usefixtures("clock")
def test_a_network_without_a_limit_meets_none(monkeypatch):
    monkeypatch.setattr(cost, "LIMITS", {row: {} for row in ROWS})
    results = cost.measure_cost("mlp", rounds=1, look=20, settled=1)
    assert all(row["limit"] is None and row["met"] is None for row in results[1:])


def test_rounds_between_two_looks_count_as_one():
    rounds = [{"row": row, "base": 2.0} for row in (2.0, 2.0, 8.0, 4.0)]
    assert cost.ratio(rounds, "row", "base") == 1.5
    assert cost.ratio(rounds, "row", "base", span=2) == pytest.approx((1 + 3) / 2)
    assert cost.ratio(rounds, "row", "base", span=4) == 2


def test_peak_is_what_a_call_makes_and_holds_at_once():
    held = [torch.ones(1000)]

    def run():
        held.clear()  # makes no room
        made = torch.ones(1000)
        made.add(1)
        made.add(2)  # two of 4000 bytes at once, never three
        held.append(made)

    # from the second on, what is freed was made while the profiler watched
    assert [peak_bytes(run) // 4000 for _ in range(3)] == [2, 2, 2]


@pytest.mark.parametrize(("network", "share", "of_nodes"), [("mlp", 1, 2), ("blocks", 0.25, 0)])
def test_rows_of_memory_and_their_limits(network, share, of_nodes):
    backprop, given, auto, *by_hand = cost.measure_memory(network)
    rows = [row["row"] for row in (backprop, given, auto, *by_hand)]
    assert rows[:3] == ["backprop", "ipc", "ipc, auto gamma"]
    assert rows[3:] == (["ipc, by hand"] if network == "mlp" else [])
    for row in (given, auto, *by_hand):
        assert row["peak_mib"] > 0
        assert row["ratio"] == pytest.approx(row["peak_mib"] / backprop["peak_mib"])
    nodes = {"mlp": 4 * 8, "blocks": 2 * 4 * 3 * 8}[network] * 4 / 2**20
    assert given["nodes_mib"] == pytest.approx(nodes)
    allowed = share * backprop["peak_mib"] + of_nodes * nodes
    assert given["limit_mib"] == pytest.approx(allowed)
    assert given["met"] == (given["peak_mib"] <= allowed)
    assert "limit_mib" not in auto


def test_a_recorded_forward_against_a_plain_one(monkeypatch):
    spent, grad = [0.0], []

    def run(seconds):
        spent[0] += seconds
        grad.append(torch.is_grad_enabled())

    monkeypatch.setattr(cost.time, "process_time", lambda: spent[0])
    with torch.no_grad():
        found = cost.recorded_forward_ratio(lambda: run(2), lambda: run(3), rounds=3, times=2)
    assert found == 1.5
    assert grad == [True] * 16  # a round before those that count


def test_tiny_bert_runs_under_autograd():
    pytest.importorskip("transformers")
    model, forward = tiny_bert()
    forward().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_networks_are_those_that_limits_are_for():
    depth = sum(isinstance(m, nn.Tanh) for m in deep())
    assert depth == 16
    assert cost.rows("deep")["ipc"][1]["T"] == depth + 1
    assert len(Transformer().layers) == 12
    ours = {row for row in cost.rows("mlp") if not row.endswith(cost.BY_HAND)}
    assert ours - {"backprop"} == set(cost.LIMITS)
    assert all(set(limits) <= set(cost.TIMED) for limits in cost.LIMITS.values())


@pytest.mark.usefixtures("clock")
@pytest.mark.slow
def test_command_writes_what_it_prints(monkeypatch, tmp_path, capsys):
    file = tmp_path / "cost.json"
    monkeypatch.setattr(sys, "argv", ["cost", "--rounds", "1", "--write", str(file)])
    monkeypatch.setattr(cost.measure_cost, "__defaults__", (0, 20, 1))
    cost.main()
    record = json.loads(file.read_text())
    assert record["seed"] == 0
    assert record["torch_threads"] == 1
    assert record["versions"]["torch"] == torch.__version__
    assert [row["row"] for row in record["cost"]] == ROWS
    assert {row["network"] for row in record["memory"]} == {"mlp", "blocks"}
    assert "spiking" in capsys.readouterr().out


@pytest.mark.parametrize("row", ["zil", "ipc"])
@pytest.mark.parametrize("depth", [2, 4])
def test_by_hand_is_the_same_arithmetic(monkeypatch, row, depth):
    def chain():
        layers = []
        for _ in range(depth - 1):
            layers += [nn.Linear(8, 8), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(8, 10)).double()

    monkeypatch.setattr(cost, "NETWORKS", {"mlp": (chain, (8,), 4, 2)})
    torch.set_default_dtype(torch.double)
    try:
        learners = []
        for name in (row, row + cost.BY_HAND):
            kind, given = cost.rows("mlp")[name]
            learners.append(cost.Learner("mlp", kind, given, 0))
            before = learners[-1].net[0].weight.detach().clone()
            for _ in range(3):
                learners[-1]()
            assert not torch.equal(before, learners[-1].net[0].weight)
    finally:
        torch.set_default_dtype(torch.float)
    for ours, by_hand in zip(*(each.net.parameters() for each in learners), strict=True):
        torch.testing.assert_close(ours, by_hand, rtol=1e-10, atol=1e-14)
