"""The report shows what was run, of the largest size, and says what was not."""

from __future__ import annotations

import json

import pytest

from recipes import report
from recipes.common.queue import Results
from recipes.image_classification import calibration, study

MACHINE = {
    "machine": "x86_64 CPU, 2 cores",
    "gpu": None,
    "torch_threads": 1,
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Writes jobs and figures where the report looks for them; all other results are missing."""
    for module in (study, calibration, report.language, report.learning_rates):
        where = tmp_path / f"{module.__name__}.json"
        monkeypatch.setattr(module, "STUDY", _Placed(module.STUDY, where))
    monkeypatch.setattr(study, "HERE", tmp_path)

    def write(rows):
        file = Results(study.STUDY.results)
        file.sittings.append({"command": "python -m x --size 0", **MACHINE})
        for job, figures in rows:
            file.add(job, figures, {})

    return write


class _Placed:
    def __init__(self, study, results):
        self.study, self.results = study, results


def row(name, algorithm, seed, test, size=0, settings=None):
    job = {"size": size, "row": name, "task": "cnn", "algorithm": algorithm, "seed": seed}
    figures = {"test": test, "epochs": 6, "best_val": test, "diverged": test is None}
    return job | {"settings": settings or {}}, figures


def line(page, title):
    (found,) = (x for x in page.splitlines() if x.startswith(f"| {title} |"))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_nothing_was_run(results):
    page = report.page()
    assert line(page, "MLP on MNIST")[4:] == ["not run"] * 6
    assert line(page, "masked: PC")[2:] == ["not run", "", "", ""]
    assert "Ours: not run." in page


def test_means_deviations_seeds_and_reductions(results):
    few = {"data.train_size": 5000}
    results(
        [
            row("mnist", "bp", 0, 98.0),
            row("mnist", "bp", 1, 99.0),
            row("mnist", "ipc", 0, 98.25),
            row("mnist", "ipc_spiking", 0, 98.75),
            row("cnn", "ipc", 0, 40.0, settings=few),
            row("cnn", "bp", 0, 41.0, settings=few),
            row("cnn", "pc", 0, None, settings=few),
            row("cnn", "ipc", 0, 70.0, size=2),
            row("vgg5", "ipc", 0, 60.0, size=2, settings={"trainer.max_epochs": 6}),
            row("width 1", "ipc", 0, 33.0, settings=few),
        ]
    )
    page = report.page()
    mnist = line(page, "MLP on MNIST")
    assert mnist[1:4] == ["98.26 ± 0.12", "98.55 ± 0.14", "98.54 ± 0.86"]
    assert mnist[4:] == [
        "98.50 ± 0.71 (2)",
        "not run",
        "98.25 (1)",
        "98.75 (1)",
        "not run",
        "all images, 6 epochs",
    ]
    assert line(page, "CNN on CIFAR-10")[4:] == [
        *("not run at this size", "not run at this size", "70.00 (1)", "not run", "not run"),
        "all images, 6 epochs",
    ]
    assert (
        line(page, "VGG-5 on CIFAR-10 (others' best, PC: any kind)")[-1]
        == "**reduced**: all images, 6 epochs"
    )
    assert line(page, "1")[1:] == [
        *("67.92", "70.61", "not run", "not run", "33.00 (1)", "not run", "not run"),
        "**reduced**: 5,000 images, 6 epochs",
    ]
    machine = "On x86_64 CPU, 2 cores, 1 thread, torch 2.13.0:"
    assert f"{machine}\n\n- `python -m x --size 0`\n" in page


def test_divergence_is_told(results):
    results([row("cnn", "pc", 0, None), row("cnn", "pc", 1, 30.0)])
    assert line(report.page(), "CNN on CIFAR-10")[5] == "30.00 (2), 1 diverged"


def test_the_committed_results_make_the_page(tmp_path):
    report.main(["--out", str(tmp_path / "report.md")])
    page = (tmp_path / "report.md").read_text()
    assert page == report.PAGE.read_text(), "run python -m recipes.report"
    assert "55 of 96" in page
    assert "75 of 96" in page
    figures = json.loads((study.HERE / "speed.json").read_text())
    assert f"`{figures['command']}`" in page
    assert max(figures["data_share"].values()) < 0.1


def language_models(rows):
    """Lines of Table 3 by name, from (size, row, variant, test)."""
    file = Results(report.language.STUDY.results)
    file.sittings.append({"command": "python -m x", **MACHINE})
    for size, row, variant, test in rows:
        job = {"size": size, "row": row, "seed": 0, "settings": {}}
        job |= {"variant": variant} if variant else {}
        figures = {"test": test, "batches": 10 + size, "seconds": 0.5, "diverged": False}
        file.add(job, figures, {})
    page = report.page()
    names = [f"{task}: {label}" for task in ("masked", "conditional") for label in LABELS]
    return {name: line(page, name)[1:] for name in names}


LABELS = ("BP", "BP, falling rate", "PC", "iPC, head only", "iPC, all nodes")


def test_language_models_are_compared_at_a_size_that_backprop_and_ipc_share(results):
    told = language_models(
        [
            *((0, "masked_bp", "", 5.0), (0, "masked_ipc", "", 4.0), (0, "masked_pc", "", 6.0)),
            *((1, "masked_bp", "", 9.0), (1, "masked_ipc", "", 8.0), (2, "masked_bp", "", 7.0)),
            *((2, "conditional_bp", "", 3.0), (2, "conditional_ipc", "", 2.0)),
            *((1, "masked_ipc", "all nodes", 11.0), (1, "masked_bp", "falling rate", 12.0)),
        ]
    )
    small, large = "**reduced**: 10", "**reduced**: 11"
    assert told["masked: BP"] == ["120.02 ± 13.19 (7)", "9.0 (1 of 1)", large, "11", "0.50"]
    assert told["masked: PC"] == ["523.08 ± 12.3 (3)", "6.0 (1 of 1)", small, "10", "0.50"]
    assert told["masked: BP, falling rate"] == ["", "12.0 (1 of 1)", large, "11", "0.50"]
    assert told["masked: iPC, head only"] == ["", "8.0 (1 of 1)", large, "66", "0.50"]
    assert told["masked: iPC, all nodes"][1:4] == ["11.0 (1 of 1)", large, "66"]
    assert told["masked: iPC, all nodes"][0] == "106.19 ± 10.54 (10)"
    assert told["conditional: iPC, head only"][1:4] == ["2.0 (1 of 1)", "**reduced**: 12", "48"]
    assert told["conditional: iPC, all nodes"] == ["142.54 ± 4.23 (7)", "not run", "", "", ""]
