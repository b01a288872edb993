"""The stability studies: their queue resumes, divergence is a result, criteria are as stated."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from recipes.common import queue
from recipes.common.queue import Results, main, ordered
from recipes.stability import architectures, defaults, depth, learning_rates, training
from recipes.stability.data import Images, cifar10

STUDIES = [learning_rates.STUDY, depth.STUDY, architectures.STUDY, defaults.STUDY]


def images(train=24, test=16):
    torch.manual_seed(0)
    return Images(*((torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,))) for n in (train, test)))


@pytest.mark.parametrize("algorithm", ["bp", "pc", "ipc"])
def test_divergence_is_a_result(algorithm):
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10))
    data = images()
    data.train[0][20:] = math.inf
    job = {"algorithm": algorithm, "gamma": None if algorithm == "bp" else 0.1, "seed": 0}
    job |= {"lr": 1e-3, "weight_decay": 0.0, "epochs": 2, "batch": 8}
    figures = training.classify(net, data, job)
    assert figures["diverged"]
    assert figures["loss"] is None
    assert 0 <= figures["accuracy"] <= figures["best_accuracy"] <= 100
    json.dumps(figures, allow_nan=False)


def test_accuracy_of_a_broken_network_is_chance():
    net = nn.Linear(2, 10)
    nn.init.constant_(net.weight, math.nan)
    assert training.accuracy(net, torch.ones(4, 2), torch.zeros(4, dtype=torch.long)) == 10


def searched(algorithm, gamma, accuracies):
    pairs = [(rate, decay) for rate in learning_rates.RATES for decay in learning_rates.DECAYS]
    return [
        {"size": 0, "algorithm": algorithm, "gamma": gamma, "lr": rate, "weight_decay": decay}
        | {"best_accuracy": best, "diverged": best == 10.0}
        for (rate, decay), best in zip(pairs, accuracies, strict=False)
    ]


def cells(table):
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def test_the_papers_criterion():
    rows = [
        *searched("bp", None, [40.0, 30.1, 30.0, 10.0]),
        *searched("pc", 0.1, [50.0, 40.0, 40.1, 10.0]),
        *searched("pc", 0.5, [10.0]),
        *searched("pc", "auto", [45.0, 30.0, 45.0, 45.0]),
    ]
    assert [row["best_accuracy"] for row in learning_rates.converged(rows)] == [
        *(40.0, 30.1, 50.0, 40.1, 45.0, 45.0, 45.0)
    ]
    (table,) = learning_rates.tables(rows)
    assert cells(table) == [
        ["bp", "-", "2/4", "2/2", "1", "40.0 %"],
        ["pc", "0.1", "2/4", "1/2", "1", "50.0 %"],
        ["pc", "0.5", "0/1", "0/2", "1", "10.0 %"],
        ["pc", "all fixed", "2/5", "", "2", "50.0 %"],
        ["pc", "auto", "3/4", "1/2", "0", "45.0 %"],
    ]
    assert isinstance(learning_rates.picture(rows), Figure)


def test_depth_table():
    rows = [
        {"size": 0, "network": "mlp", "depth": d, "algorithm": name, "gamma": gamma}
        | {"lr": rate, "accuracy": accuracy, "seed": seed}
        for name, gamma, rate, d, seed, accuracy in [
            ("bp", None, 1e-3, 2, 0, 80.0),
            ("bp", None, 3e-4, 2, 0, 90.0),
            ("pc", 1.0, 1e-3, 2, 0, 60.0),
            ("pc", 1.0, 1e-3, 2, 1, 80.0),
            ("pc", 0.1, 1e-3, 2, 0, 50.0),
            ("pc", "auto", 1e-3, 2, 0, 69.5),
            ("pc", "auto", 1e-3, 64, 0, 20.0),
        ]
    ]
    rows += [rows[-2] | {"momentum": 0, "accuracy": 77.0}]  # is not auto's, nor a fixed one
    rows += [rows[-3] | {"algorithm": "ipc", "precisions": "spiking", "accuracy": 86.0}]
    found = depth.curves(rows, "mlp")
    assert found["bp", None] == {2: 90.0}
    assert found["pc", "auto, plain"] == {2: 77.0}
    assert found["pc", 1.0] == {2: 70.0}
    assert depth.shortfall(found, "pc") == {2: 0.5}
    plain, residual, relu = depth.tables(rows)
    assert ["pc", "behind", "[green]+0.5[/]", "", "", "", "", ""] in cells(plain)
    assert ["pc", "auto, plain", "77.0", "", "", "", "", ""] in cells(plain)
    assert ["ipc", "auto, spiking", "86.0", "", "", "", "", ""] in cells(plain)
    assert all(row[2:] == [""] * 6 for row in (*cells(residual), *cells(relu)))
    assert isinstance(depth.picture(rows), Figure)


def test_architectures_pools_the_seeds_that_all_gammas_have():
    def row(network, gamma, seed, loss, lr=1e-3):
        job = {"size": seed, "network": network, "algorithm": "ipc", "gamma": gamma, "seed": seed}
        return job | {"steps": 50, "lr": lr, "loss": loss}

    rows = [
        row(network, gamma, seed, (2.0 if gamma == "auto" else 1.0) + seed)
        for network in architectures.NETWORKS
        for gamma in (1.0, 0.5, 0.1, 0.01, "auto")
        for seed in (0, 1)
    ]
    rows += [rows[0] | {"seed": 2, "loss": 0.0}]  # which no other gamma has
    rows += [rows[0] | {"momentum": 0, "gamma": "auto", "loss": 0.0}]
    rows += [row(network, "auto", seed, 1.0, 3e-3) for network in ("BERT", "T5") for seed in (0, 1)]
    (table,) = architectures.pooled(rows)
    assert table.title == "ipc at 0.001, seeds 0, 1: loss"
    assert ["BERT", *["1.5"] * 4, "2.5", "", "1.67"] in cells(table)
    assert "gamma 1.0: 12/12, 1; " in table.caption
    assert table.caption.endswith("gamma auto: 0/12, 1.67")
    assert architectures.pooled(rows[1:]) == []  # BERT has a seed less


def test_architectures_table():
    rows = [
        {"size": 0, "network": network, "algorithm": "ipc", "gamma": gamma, "loss": loss}
        | {"steps": 50, "lr": 1e-3}
        for network, gamma, loss in [
            ("BERT", 1.0, None),
            ("BERT", 0.1, 2.0),
            ("BERT", "auto", 2.2),
            ("T5", 0.1, 1.0),
            ("T5", "auto", 1.2),
            ("UNet", 0.1, 1.0),
            ("UNet", "auto", None),
        ]
    ]
    found = architectures.losses(rows, "BERT", "ipc")
    assert found == {1.0: math.inf, 0.1: 2.0, "auto": 2.2}
    rows += [rows[2] | {"momentum": 0, "loss": 0.1}]
    found = architectures.losses(rows, "BERT", "ipc")
    assert found["auto, plain"] == 0.1
    assert architectures.ratio(found) == pytest.approx(1.1)
    rows += [rows[1] | {"lr": 3e-3, "loss": loss} for loss in (1.0, 2.6)]
    rows += [rows[2] | {"lr": 3e-3, "loss": None}]
    found = architectures.losses(rows, "BERT", "ipc")
    assert (found[0.1], found["auto"]) == (1.8, 2.2)  # the best mean over seeds
    assert architectures.ratio({0.1: 0.0, "auto": 0.0}) == 1
    assert architectures.ratio({0.1: 1.0}) is None
    assert len(architectures.tables(rows)) == 2  # none of PC, and none has noted what it left
    half = rows[0] | {"left": 0.5}
    *_, left = architectures.tables([*rows, half, half | {"left": 0.7}])
    assert cells(left) == [["BERT, 0.001", "0.60", "", "", "", "", ""]]
    ours, against, *_ = architectures.tables(rows)
    assert ["BERT", "inf", "", "1.8", "", "2.2", "0.1", "1.22"] in cells(ours)
    assert cells(against) == [
        ["0.001", "0/1, inf", "", "3/3, 1", "", "1/3, inf", "1/1, 0.05"],
        ["0.003", "", "", "1/1, 1", "", "0/1, inf", ""],
        ["best", "0/1, inf", "", "3/3, 1", "", "0/3, inf", "1/1, 0.0556"],
    ]
    assert isinstance(architectures.picture(rows), Figure)


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.results.stem)
@pytest.mark.slow
def test_smallest_jobs(study, tmp_path, monkeypatch):
    digits = Images(*((x[:, 0, :28, :28], y) for x, y in images()))
    monkeypatch.setattr(learning_rates, "cifar10", lambda *_: images())
    monkeypatch.setattr(depth, "mnist", lambda *_: digits)
    chosen = {}
    for job in ordered(study.jobs()):
        tiny = {name: 2 for name in ("epochs", "steps") if name in job}
        if job["algorithm"] in ("bp", "pc", "ipc"):
            chosen.setdefault(job["algorithm"], job | tiny)
    jobs = list(chosen.values())
    assert {"pc", "ipc"} <= set(chosen)
    out = tmp_path / study.results.name
    main(replace(study, jobs=lambda: jobs), ["--out", str(out)])
    rows = Results(out).rows(jobs)
    assert len(rows) == len(jobs)
    assert all(not row["diverged"] and math.isfinite(row["loss"]) for row in rows)
    assert all((row["gamma_at_end"] is None) == (row["algorithm"] == "bp") for row in rows)
    assert out.with_suffix(".png").exists()


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.results.stem)
def test_every_job_is_its_own(study):
    jobs = study.jobs()
    assert len({queue.key(job) for job in jobs}) == len(jobs)
    assert "auto" in {job["gamma"] for job in jobs}
    assert all(json.loads(queue.key(job)) == job for job in jobs)


def test_numbers_of_jobs():
    smallest = [job for job in learning_rates.jobs() if job["size"] == 0]
    assert len(smallest) == 32 + 2 * 128
    assert len(architectures.NETWORKS) == 12
    sizes = [job["size"] for job in architectures.jobs()]
    assert (sizes.count(0), sizes.count(1)) == (720, 2160)
    for study in (architectures, depth, defaults):
        own = {(job["algorithm"], job["momentum"]) for job in study.jobs() if "momentum" in job}
        assert own == {("pc", 0), ("ipc", 0)}
    for study in (depth, defaults):  # of which one step a batch counts in full, as of pc
        spiking = [job for job in study.jobs() if "precisions" in job]
        assert {job["algorithm"] for job in spiking} == {"ipc"}
        large = {job["lr"] for job in spiking if job.get("task") in defaults.LARGE}
        assert large == (set(defaults.SLOW["pc"]) if study is defaults else set())
        rest = {job["lr"] for job in spiking if job.get("task") not in defaults.LARGE}
        assert rest == set(study.RATES["pc"])
    assert {job["depth"] for job in depth.jobs()} == {2, 4, 8, 16, 32, 64}


def test_data_dir_without_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-\*\.parquet"):
        cifar10(str(tmp_path), 1, 1)


@pytest.mark.parametrize("network", architectures.NETWORKS)
def test_architectures_are_reproducible(network):
    values = [architectures.problem(network, 0)[1]().item() for _ in range(2)]
    assert values[0] == values[1]
    assert architectures.problem(network, 1)[1]().item() != values[0]


def test_deep_networks_carry_signals():
    x = torch.randn(8, 28, 28)
    for make in (depth.mlp, depth.Residual):
        net = make(64, 32)
        net(x).square().mean().backward()
        first = next(p for p in net.parameters() if p.ndim == 2)
        last = [p for p in net.parameters() if p.ndim == 2][-1]
        assert 1e-3 < float(first.grad.norm() / last.grad.norm()) < 1e3


def test_defaults_take_the_rate_that_validates_best():
    rows = [
        {"size": 0, "task": "digits", "algorithm": name, "T": None, "gamma": "auto"}
        | {"lr": rate, "seed": seed}
        | {"accuracy": test, "validation": val, "steps": 8, "cpu_seconds": 1}
        for name, rate, seed, test, val in (
            *(("bp", 1e-3, 0, 90.0, 80.0), ("bp", 1e-3, 1, 92.0, 82.0)),
            *(("bp", 5e-3, 0, 99.0, 70.0), ("pc", 1e-3, 0, 89.0, 80.0)),
        )
    ]
    rows += [rows[-1] | {"momentum": 0, "accuracy": 91.0}]
    rows += [rows[0] | {"algorithm": "ipc", "precisions": "spiking", "accuracy": 93.0}]
    rows += [rows[0] | {"algorithm": "ipc", "gamma": 0.1, "accuracy": 94.0}]
    assert [r["accuracy"] for r in defaults.chosen(rows, "digits", "bp", {})] == [90.0, 92.0]
    table, *_ = defaults.tables(rows)
    assert list(table.columns[0].cells) == [
        *("bp", "pc", "pc, plain", "ipc, spiking", "ipc, gamma 0.1")
    ]
    assert list(table.columns[3].cells) == ["91.00 ± 1.41", "89.00", "91.00", "93.00", "94.00"]
    assert list(table.columns[4].cells) == ["+0.00", "-2.00", "+0.00", "+2.00", "+3.00"]


def test_mnist_is_validated_on_images_that_are_not_learned(monkeypatch):
    images, labels = torch.arange(48.0).view(12, 1, 2, 2), torch.arange(12) % 10
    read = Images((images, labels), (images[:3] + 100, labels[:3]))
    monkeypatch.setattr(defaults, "mnist", lambda folder, train, test: read)
    monkeypatch.setattr(defaults, "HELD_OUT", 4)
    splits = defaults._mnist(None)
    assert {name: len(y) for name, (_, y) in splits.items()} == {"train": 8, "val": 4, "test": 3}
    together = torch.cat([splits["train"][0], splits["val"][0]])
    torch.testing.assert_close(together, images.flatten(1))
    torch.testing.assert_close(splits["test"][0], images[:3].flatten(1) + 100)
    mine = [job for job in defaults.jobs() if job["task"].startswith("MNIST")]
    assert {(j["size"], j["scale"], j["epochs"]) for j in mine} == {(1, 30.0, 5)}
    assert len(mine) == 5 * 3 * (4 + 4)
    monkeypatch.setitem(mine[0], "epochs", 1)
    assert 0 <= defaults.run(mine[0], None)["accuracy"] <= 100


@pytest.mark.parametrize("T", [None, 3])
def test_a_job_of_defaults(T):
    job = next(j for j in defaults.jobs() if j["algorithm"] == "pc")
    job |= {"T": T, "epochs": 1, "loss": "squared"}
    figures = defaults.run(job, None)
    assert 0 <= figures["validation"] <= 100
    assert figures["steps"] == (T or 8)
