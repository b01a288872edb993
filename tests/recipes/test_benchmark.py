"""The benchmark of a step's time and memory: what it measures, on small networks."""

import pytest
from torch import nn

from recipes.efficiency import benchmark


@pytest.mark.slow
def test_memory_of_the_cnn():
    row = benchmark.measure_memory("cnn")
    assert row["nodes_mib"] > 20
    assert row["bp_peak_mib"] < row["ipc_peak_mib"] <= row["ipc_allowed_mib"]


@pytest.mark.filterwarnings("ignore:T=2 inference steps never reach")
def test_benchmark_measures_every_ratio(monkeypatch):
    tiny = (lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 10)), (8,), 4, 2)
    monkeypatch.setitem(benchmark.NETWORKS, "tiny", tiny)
    row = benchmark.time_steps("tiny", rounds=1)
    noise = ("auto_share", "conjugate_share")  # differences
    assert all(value > 0 for name, value in row.items() if name not in noise)
    assert benchmark.table({"tiny": {**row, **benchmark.measure_memory("tiny")}}).row_count == 1
